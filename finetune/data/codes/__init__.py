"""Recordings as Mimi's codes, kept on disk."""
