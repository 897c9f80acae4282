"""Results that are computed once: a file per run, read instead of computed when it is there already."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import DataError, UserError
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.state_file import check_writable


def stored_run(
    path: Path, description: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run gave, from its file or computed now.

    Args:
        path: of the file, JSON.
        description: everything that decides the outcome.
        compute: the run; what it returns goes into the file beside the description.

    Raises:
        UserError: the file is a run with another description.
        DataError: the file is damaged.
        StateError: it cannot be written.
    """
    description = json.loads(json.dumps(description))
    if path.is_file():
        run = read_run(path)
        if run["description"] != description:
            raise UserError(f"{path}: is a run with other settings; give another --out, or remove it.")
        return run
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)  # before the work, not after
    run = {"description": description, **compute()}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(run) + "\n", encoding="utf-8")
    return run


def read_run(path: Path) -> dict[str, Any]:
    """A run from its file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or not isinstance(run.get("description"), dict):
            raise ValueError(path)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is damaged or no run; remove it, the run is made again.") from None
    return run
