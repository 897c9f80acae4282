"""The folder that results are written to."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.files import read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing

RESULTS_FILE = "results.json"  # of every measurement
SETTINGS_FILE = "settings.json"  # what may not differ between two measurements in one folder
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


def check_settings(folder: Path, ours: Mapping[str, Any]) -> None:
    """See that a folder holds nothing measured with other settings.

    Raises:
        ConfigError: it does, or what says so cannot be read.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        return
    try:
        theirs = read_json_object(path, error=ConfigError)
    except ConfigError as error:
        raise ConfigError(
            f"--out: {str(error).rstrip('.')}; remove it to go on in this folder, or choose another."
        ) from None
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"--out: {folder} holds a measurement with {name} {_short(theirs.get(name))} instead of "
                f"{_short(ours.get(name))}; choose another folder."
            )


def make_folder_of(folder: Path, settings: Mapping[str, Any], *parts: str) -> None:
    """Make a folder that says with which settings is measured in it, and folders in it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        for part in ("", *parts):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS_FILE) as partial:
            write_json(partial, dict(settings))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out: {folder}: cannot be written: {reason}.") from None


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with replacing(folder / RESULTS_FILE) as partial:
            write_json(partial, dict(results))
    except OSError as error:
        raise unwritable(folder, error) from None


def unwritable(path: Path, error: OSError) -> ConfigError:
    """What to raise when a file or folder of the results cannot be written."""
    return ConfigError(f"{path}: cannot be written: {error.strerror}; {_FIX}.")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
