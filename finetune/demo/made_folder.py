"""A folder that is made once: complete or not there, with the settings that it was made with."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import new_folder, rename_to_backup

logger = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1
_MARKER_NAME = "demo.json"


@dataclass(frozen=True)
class MadeFolder:
    """What is there.

    Attributes:
        path: the folder.
        settings: what it was made with.
        report: what was found out while it was made.
        reused: true if it existed before.
    """

    path: Path
    settings: dict[str, Any]
    report: dict[str, Any] = field(repr=False)
    reused: bool


def make_once(
    path: Path, settings: dict[str, Any], build: Callable[[Path, dict[str, Any]], dict[str, Any]]
) -> MadeFolder:
    """Make a folder, or find it complete and made with the same settings.

    It is made beside `path` and takes its place at the end, so what is there is always complete. A folder of
    other settings is renamed, nothing is deleted.

    Args:
        path: the folder, absolute.
        settings: JSON; what decides the files.
        build: makes all files below the folder that it is given, from the settings, and returns the report.

    Raises:
        UserError: `path` holds something else.
    """
    if (found := find_made(path)) and found.settings == settings:
        return found
    _check_replaceable(path)
    with new_folder(path) as partial:
        report = build(partial, settings)
        _write_marker(partial, settings, report)
        if path.exists():
            backup = rename_to_backup(path)
            logger.info("%s has other settings or is incomplete, it is now %s", path, backup)
    return MadeFolder(path, settings, report, reused=False)


def find_made(path: Path) -> MadeFolder | None:
    """The folder, whatever its settings, or None if there is no complete one."""
    try:
        marker = json.loads((path / _MARKER_NAME).read_text())
        sizes = {name: (path / name).stat().st_size for name in marker["files"]}
        if sizes != marker["files"]:
            return None
        return MadeFolder(path, marker["settings"], marker["report"], reused=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that is out of range."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, it must be 0 to {MAX_SEED}.")


def _write_marker(path: Path, settings: dict[str, Any], report: dict[str, Any]) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    marker = {"settings": settings, "report": report, "files": sizes}
    (path / _MARKER_NAME).write_text(json.dumps(marker, indent=2) + "\n")


def _check_replaceable(path: Path) -> None:
    """Raise UserError if there is anything but nothing, an empty directory or files of the demo."""
    if not path.exists() or (path / _MARKER_NAME).is_file():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise UserError(f"{path} exists and was not made by the demo: remove it or name another directory.")
