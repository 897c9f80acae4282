"""Files that are whole or not there: written beside their place and renamed into it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write that is renamed over `path` at the end, and gone after an error.

    A symbolic link stays one: what it points to is replaced.

    Raises:
        OSError: it cannot be made or renamed; an older file is intact.
    """
    path = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(prefix=".moshi-ttt-", suffix=path.suffix[-20:], dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)  # what a newly written file would have
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
