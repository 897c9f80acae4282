"""What the measurements share: inputs, settings and timing."""
