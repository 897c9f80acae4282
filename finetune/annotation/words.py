"""What an annotation engine returns."""

from typing import NamedTuple


class TimedWord(NamedTuple):
    """One word as written, and when it is heard, in seconds from the start of the recording."""

    text: str
    start_sec: float
    end_sec: float
