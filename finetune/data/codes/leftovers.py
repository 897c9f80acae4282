"""Temporary files of the code cache, and which of them nobody will finish any more."""

import os
import socket
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_DAY_SEC = 86_400


def temporary_file(folder: Path) -> Path:
    """A new name for a file that is being written, which tells who writes it."""
    return folder / f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"


def remove_leftovers(folders: Iterable[Path]) -> int:
    """Remove temporary files whose process has ended, or that are a day old; those of others at work stay.

    Returns:
        How many.
    """
    count = 0
    for folder in set(folders):
        try:
            found = list(folder.glob(".*.tmp"))
        except (OSError, ValueError):  # no folder can have this name, or it cannot be read
            continue
        for path in found:
            with suppress(OSError):
                if _is_left(path):
                    path.unlink()
                    count += 1
    return count


def _is_left(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > _DAY_SEC:
        return True
    host, _, number = path.name.removeprefix(".").removesuffix(".tmp").rpartition(".")[0].rpartition(".")
    if host != socket.gethostname() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
