"""Runs whose results the documentation shows, a command each."""
