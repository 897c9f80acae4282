"""The inner loop with a backward pass by hand: the numbers of `inner_loop` in a fraction of its time and memory."""

from moshi_ttt.manual.function import run_manual

__all__ = ["run_manual"]
