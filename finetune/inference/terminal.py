"""Printing that never ends a conversation: the reader of a pipe may leave, a disk may be full."""

import os
import sys


def say(text: str = "", *, end: str = "\n") -> None:
    """As print, at once. After an error of the output, nothing more is printed."""
    try:
        sys.stdout.write(text.encode(errors="backslashreplace").decode() + end)
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at the very end
