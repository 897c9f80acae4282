"""Dialogues of human actors from games that Debian packages."""
