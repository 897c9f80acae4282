"""The folder that results are written to."""

import os
import tempfile
from pathlib import Path

from finetune.errors import ConfigError

_FIX = "choose a folder with --out"


def check_out(out: str | None) -> None:
    """See that the folder that was asked for could be made, before anything slow.

    Raises:
        ConfigError: it could not.
    """
    if out is None:
        return
    if not out:  # as a path it would be the current directory
        raise ConfigError("--out: is empty; give a folder.")
    try:
        problem = _problem(Path(out))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out: {out[:80]!r} is not a usable path: {reason}.") from None
    if problem is not None:
        raise ConfigError(f"--out: {out}{problem}.")


def check_default(folder: Path) -> None:
    """See that the folder of results that nobody asked for could be made.

    Raises:
        ConfigError: it could not.
    """
    try:
        problem = _problem(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    if problem is not None:
        raise ConfigError(f"{folder}{problem}; {_FIX}.")


def make_folder(folder: Path) -> None:
    """Make the folder of the results, and see that files can be written into it.

    Raises:
        ConfigError: it cannot, or they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".moshi-ttt-", dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """What to raise when a file or folder of the results cannot be written."""
    return ConfigError(f"{path}: cannot be written: {error.strerror}; {_FIX}.")


def _problem(folder: Path) -> str | None:
    """Why a folder cannot be made or written, as far as that can be seen without trying."""
    if folder.exists() and not folder.is_dir():
        return " is a file; give a folder"
    path = folder
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return f": cannot be written: {path} is not a folder that may be written"
    return None
