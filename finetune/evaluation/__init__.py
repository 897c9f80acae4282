"""Measuring trained models: the work of evaluate.py."""
