"""Small file operations that several parts share."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.errors import CheckpointError, UserError, one_line
from moshi_ttt.files.regular_file import regular_only


@contextmanager
def writing_to(path: Path, *, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Context in which a run writes a file, of which the system's own message would not name it.

    Args:
        path: of the file or folder.
        errors: what cannot be written is reported by.

    Raises:
        UserError: it cannot be written.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); what was saved before is intact.") from None


MAX_TEXT_BYTES = 64 * 2**20  # of JSON and YAML


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that is renamed to `path` at the end, and gone after an error.

    It lies beside `path`, so that the renaming stays inside one file system.

    Raises:
        OSError: it cannot be made or renamed, which it cannot while `path` holds anything.
    """
    # Not the process's number: in containers that share a disk, several processes have the same one.
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def rename_to_backup(path: Path) -> Path:
    """Rename a file or folder to `<name>.bak-<time>`, a name that is free, and return it."""
    stem = f"{path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    backup, number = path.with_name(stem), 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{stem}-{number}")
    path.rename(backup)
    return backup


def finite_or_null(value: float) -> float | None:
    """A number for JSON, which has no NaN: what does not exist is null, and a reader sees that."""
    return value if math.isfinite(value) else None


def read_regular(path: Path, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a file that a stranger may have put there: not of a pipe or device, which may never end.

    Raises:
        OSError: it is no regular file, is larger than `max_bytes`, or cannot be read.
    """
    with open(path, "rb", opener=regular_only) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, more than {max_bytes:,}", str(path))
        return file.read()


def read_json_object(path: Path, *, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """A JSON object, by default one of a checkpoint or model repository.

    Args:
        path: of the file.
        error: what is raised.

    Raises:
        UserError: the file is missing, no regular file, too large, not JSON or not an object.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8-sig"))
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, on disk when this returns."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    sync_to_disk(path)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular_only) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """The SHA-256 of a value as JSON, in hexadecimal digits; the order of an object's keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_to_disk(path: Path) -> None:
    """Make sure a file or directory is on disk before what refers to it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
