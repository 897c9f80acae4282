"""One run at a time in a run directory: a lock that ends with the process that holds it, however that ends.

Two runs in one folder would delete each other's checkpoints. The lock is the kernel's (flock), so that a run
that was killed does not keep its folder; a library for it would add nothing but the choice of other locks.
"""

import errno
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO

from finetune.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
LOCK_FILE = ".lock"

_held: set[int] = set()


def _leave_to_the_parent() -> None:
    """In a loader process, which is a copy of this one and may outlive it by seconds."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class RunLock:
    """The lock of one run directory; as a context it is released at the end."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, run_dir: Path) -> None:
        """Lock a run directory that exists, and let go of the one locked before; the same one stays locked.

        Raises:
            ConfigError: another run has it.
            OSError: the lock's file cannot be written.
        """
        path = run_dir / LOCK_FILE
        if self._file is not None and _is_file(path, self._file):
            return
        file = _lock(path, run_dir)
        self.release()
        if file is not None:
            self._path, self._file = path, file
            _held.add(file.fileno())

    def release(self) -> None:
        """Let others use the directory."""
        path, file = self._path, self._file
        self._path = self._file = None
        if path is None or file is None:
            return
        if _is_file(path, file):  # a directory that was renamed took its own with it
            path.unlink()
        _held.discard(file.fileno())
        file.close()


def _lock(path: Path, run_dir: Path) -> IO[str] | None:
    """The file with the lock on it; None where the file system has no locks."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise ConfigError(
                f"run_dir: {run_dir} is being written by another run{holder}; wait for it, or choose another."
            ) from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            logger.warning(
                "run_dir: %s cannot be locked here (%s); start no second run in it.", run_dir, error.strerror
            )
            return None
        if _is_file(path, file):  # its holder may have removed it just before
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    holder = file.read(300).strip()
    return f" ({holder})" if holder else ""


def _is_file(path: Path, file: IO[str]) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
