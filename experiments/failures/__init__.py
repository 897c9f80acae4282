"""Trainings that fail on purpose: does the monitor notice, and only what it should?"""
