"""Conversations in which something is said once and needed later. `python -m finetune.demo.recall`."""
