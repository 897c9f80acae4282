"""Files of results that are never replaced by less: results.json, comparison.json and the challenge's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.evaluation.out_folder import RESULTS_FILE, make_folder, unwritable
from finetune.evaluation.spoken.measure import MeasuredItems
from finetune.evaluation.spoken.results import results_json, submission_file, submission_lines
from finetune.files import read_json_object, rename_to_backup, write_json
from finetune.inference.terminal import say
from moshi_ttt.files.atomic_file import replacing

PARTIAL_FILE = "results.partial.json"
COMPARISON_FILE = "comparison.json"
SUBMISSION_DIR = "submission"
PARTS = ("first", "second")  # folders of the models of a comparison
# Whatever a measurement may write into its folder.
ALL_FILES = (
    RESULTS_FILE,
    COMPARISON_FILE,
    PARTIAL_FILE,
    SUBMISSION_DIR,
    *(f"{part}/{name}" for part in PARTS for name in (RESULTS_FILE, PARTIAL_FILE, SUBMISSION_DIR)),
)


class ResultsFile:
    """results.json of one model, written when all tasks are done; until then they are in `PARTIAL_FILE`.

    So a measurement that is interrupted leaves an older results.json as it is. Tasks of an interrupted one
    with the same model and settings stay in the partial file until this one is complete.

    Args:
        folder: of the results; it is made.
        absent, model, settings: see `results_json`.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        absent: Mapping[str, str],
        model: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._shared = {"absent": absent, "model": model, "settings": settings}
        self._parts: dict[str, dict[str, Any]] = {"tasks": {}, "items": {}, "pairs": {}}
        make_folder(folder)
        self._earlier = self._earlier_parts(folder / PARTIAL_FILE)

    def add(
        self, name: str, task: Mapping[str, Any], *, items: Mapping[str, Any], pairs: Sequence[Any]
    ) -> None:
        """Save a task, in place of what was said about it before.

        Raises:
            ConfigError: it cannot be written.
        """
        for part, value in (("tasks", task), ("items", items), ("pairs", pairs)):
            self._parts[part][name] = value
        known = {part: self._earlier[part] | values for part, values in self._parts.items()}
        _write(self._folder / PARTIAL_FILE, results_json(**known, **self._shared))

    def finish(self) -> None:
        """Write results.json with the tasks that were added.

        Raises:
            ConfigError: it cannot be written.
        """
        save_complete(self._folder / RESULTS_FILE, results_json(**self._parts, **self._shared))
        (self._folder / PARTIAL_FILE).unlink(missing_ok=True)

    def _earlier_parts(self, path: Path) -> dict[str, dict[str, Any]]:
        """Tasks of an interrupted measurement; a file with others is renamed."""
        if not path.exists():
            return {part: {} for part in self._parts}
        earlier, ours = _read(path), _as_json(self._shared)
        if any(earlier.get(key) != ours[key] for key in ("model", "settings")):
            _keep(path)
            return {part: {} for part in self._parts}
        return {part: earlier.get(part, {}) for part in self._parts}


def save_complete(path: Path, value: Mapping[str, Any]) -> None:
    """Write complete results.

    An older file is replaced by the same measurement only: with the same models, settings and data, of no
    fewer tasks. Any other is renamed.

    Raises:
        ConfigError: it cannot be written.
    """
    if path.exists():
        older = _read(path)
        identity = {key: value.get(key) for key in ("kind", "model", "models", "settings")}
        alike = all(older.get(key) == ours for key, ours in _as_json(identity).items())
        data = {name: task["data"] for name, task in value["tasks"].items()}
        older_data = {name: task.get("data") for name, task in older.get("tasks", {}).items()}
        if not alike or any(data.get(name) != theirs for name, theirs in older_data.items()):
            _keep(path)
    _write(path, value)


def write_submission(folder: Path, measured: MeasuredItems, *, split: str) -> None:
    """Write the headline scores of a task as the ZeroSpeech Challenge 2021 wants them; nothing for others.

    A line is `<filename> <score>`, in `lexical/dev.txt`, `syntactic/dev.txt` and the same for `test`
    (https://zerospeech.com/challenge_archive/2021/04_instructions).

    Raises:
        ConfigError: it cannot be written.
    """
    file = submission_file(measured.name, split=split)
    if file is None:
        return
    path = folder / SUBMISSION_DIR / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text("".join(submission_lines(measured)), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    try:
        with replacing(path) as partial:
            write_json(partial, dict(value))
    except OSError as error:
        raise unwritable(path, error) from None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is something else."""
    try:
        return read_json_object(path, error=ConfigError)
    except ConfigError:
        return {}


def _keep(path: Path) -> None:
    try:
        backup = rename_to_backup(path)
    except OSError as error:
        raise unwritable(path, error) from None
    say(f"{path}: holds other results, kept as {backup.name}")


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a value is when it has been written and read again."""
    return json.loads(json.dumps(value))
