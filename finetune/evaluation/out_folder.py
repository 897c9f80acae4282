"""The folder that results are written to."""

import os
from pathlib import Path

from finetune.errors import ConfigError


def check_out(out: str | None) -> None:
    """See that the folder of the results could be made, before anything slow.

    Raises:
        ConfigError: it could not.
    """
    if out is None:
        return
    if not out:  # as a path it would be the current directory
        raise ConfigError("--out: is empty; give a folder.")
    path = Path(out)
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out: {out} is a file; give a folder.")
        while not path.exists() and path != path.parent:
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise ConfigError(f"--out: {out}: cannot be written: {path} is not a folder that may be written.")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out: {out[:80]!r} is not a usable path: {reason}.") from None
