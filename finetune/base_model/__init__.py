"""Moshi's files: where they are, and what a stranger's description of them may say."""
