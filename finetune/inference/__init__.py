"""Talking to a trained model: loading it, one conversation at a time, recordings in and out."""
