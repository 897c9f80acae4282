"""Word timings for recordings: annotate.py's work."""
