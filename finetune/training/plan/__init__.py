"""What a run will be, before its first step: summary, memory, work."""
