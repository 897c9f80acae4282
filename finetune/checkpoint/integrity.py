"""Whether a checkpoint of one's own is as it was written: size and hash of every file, in DONE.json.

A resume asks. What strangers hand over is checked in `finetune.checkpoint.description`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.checkpoint.layout import DONE_FILE
from finetune.errors import CheckpointError
from finetune.files import hash_file, read_json_object


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def content_files(folder: Path) -> list[str]:
    """The files of a checkpoint but DONE.json, relative to it."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != DONE_FILE)


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What DONE.json lists.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    files = read_json_object(folder / DONE_FILE).get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(f"{folder / DONE_FILE}: damaged.")
    return files


def find_damage(folder: Path, names: Iterable[str], listed: dict[str, dict[str, Any]]) -> str | None:
    """Compare files with what DONE.json lists.

    Returns:
        What is wrong with the first that differs, None when all are intact.
    """
    for name in names:
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is not there, or no file"
            if path.stat().st_size != listed[name]["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {listed[name]['size']:,}"
            if describe_file(path) != listed[name]:
                return f"{name} has other content than was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _is_entry(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("size"), int)
