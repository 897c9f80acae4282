"""Checks of a data set: a fast one that training starts with, and one that reads every file fully."""
