"""Spoken-language scores: which of two recordings a model finds more likely."""
