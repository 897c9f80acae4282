"""Evaluating checkpoints: long recordings and what their memory does."""
