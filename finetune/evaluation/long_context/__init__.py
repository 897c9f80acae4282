"""Losses along recordings that are much longer than the attention window."""
