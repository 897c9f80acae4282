"""Losses of a model along hours of speech, with its memory learning, frozen and left out."""
