"""Checkpoints as folders that others can load."""
