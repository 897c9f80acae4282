"""What a tiny Moshi remembers of what was said once: `evaluate.py recall` on models trained for it."""
