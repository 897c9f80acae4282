"""Spoken dialogues by espeak, with the times of their words."""
