"""The log of a server that strangers reach: they choose how many lines it gets, and what stands in them."""

import logging
import time
from collections.abc import MutableMapping
from typing import Any

from aiohttp.http import HttpProcessingError

from finetune.errors import one_line


class FloodFilter(logging.Filter):
    """Lets a number of lines of one kind through in a period, and says later how many it kept back.

    Args:
        num_lines: of one kind (the text before its values are filled in).
        period_sec: length of a period.
    """

    def __init__(self, num_lines: int = 50, period_sec: float = 10.0) -> None:
        super().__init__()
        self._num_lines = num_lines
        self._period_sec = period_sec
        self._kinds: dict[str, tuple[float, int]] = {}  # begin of the period, lines in it

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        kind, now = str(record.msg), time.monotonic()
        begin, count = self._kinds.get(kind, (now, 0))
        kept_back = 0
        if now - begin > self._period_sec:
            kept_back = max(0, count - self._num_lines)
            begin, count = now, 0
        self._kinds[kind] = (begin, count + 1)
        if kept_back:
            record.msg = f"{kind} (and {kept_back} lines like this were left out)"
        return count < self._num_lines


class RequestLog(logging.LoggerAdapter):  # generic in its stubs only
    """What aiohttp has to say: a request that is none in one line, a traceback only for errors of ours."""

    def exception(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Called by aiohttp where it answers with an error of its own."""
        error = kwargs.get("exc_info")
        if isinstance(error, HttpProcessingError):
            self.warning("not a request: %s", one_line(error.message, limit=100))
        else:
            super().exception(msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The line as it is."""
        return msg, kwargs
