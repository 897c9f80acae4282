"""The inner loop with a backward pass by hand: the same numbers in a fraction of the time and memory."""

from moshi_ttt.manual.function import run_manual

__all__ = ["run_manual"]
