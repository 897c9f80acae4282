"""Measuring checkpoints: losses along long recordings, what their memory does, and spoken benchmarks."""
