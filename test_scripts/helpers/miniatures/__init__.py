"""Data sets of others in their own layouts, small enough for a test."""
