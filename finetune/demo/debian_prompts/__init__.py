"""Dialogues of human voices from Debian's telephone prompts."""
