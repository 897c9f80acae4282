"""Opening what somebody names: a file, never a pipe that would be waited for or a device without an end."""

import errno
import os
import stat
from pathlib import Path


def regular_only(path: str | Path, flags: int) -> int:
    """An opener for `open`.

    Raises:
        OSError: the path names a folder, a pipe or a device; or as `os.open`.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or device, not a file", str(path))


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file, a byte order mark left out.

    Raises:
        OSError: see `regular_only`.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open(path, encoding="utf-8-sig", opener=regular_only) as file:
        return file.read()
