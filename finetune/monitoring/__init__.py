"""Metrics, console lines and plots of a run."""
