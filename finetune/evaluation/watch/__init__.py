"""Measuring the checkpoints of a run as they appear."""
