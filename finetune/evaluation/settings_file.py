"""The file in a folder of results that says what was measured in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.files import read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing

SETTINGS_FILE = "settings.json"


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


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder that says what is measured in it.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS_FILE) as partial:
            write_json(partial, dict(settings))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out: {folder}: cannot be written: {reason}.") from None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
