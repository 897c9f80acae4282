"""Which checkpoints have been measured, in a file that outlives the process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.evaluation.out_folder import RESULTS_FILE, make_folder, unwritable
from finetune.files import read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing

RECORD_FILE = "watch.json"
_KIND = "moshi-ttt watched run"
_MAX_NAMED = 12


@dataclass(frozen=True)
class Measured:
    """A measured checkpoint.

    Attributes:
        name: of its folder.
        step: optimiser steps.
        digest: of its DONE.json: a run that was resumed may write the same step anew.
        folder: of its results, in that of the record.
        seconds: the measurement took.
        score: None: none was chosen, or it has no value.
    """

    name: str
    step: int
    digest: str
    folder: str
    seconds: float
    score: float | None = None


class Record:
    """The record of one measurement of the checkpoints of one run.

    Scores are read from the results whenever the record is, so another one may be chosen later.

    Args:
        folder: of the record; it is made.
        facts: what is measured; a folder with a record of anything else is refused.
        score: keys of results.json with dots between them; None: none is best.
        lower_is_better: of the score.

    Raises:
        ConfigError: the folder cannot be written, holds another record, or results have no such score.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], *, score: str | None, lower_is_better: bool
    ) -> None:
        self.folder = folder
        self.measured: list[Measured] = []
        self._facts = dict(facts)
        self._score = score
        self._lower_is_better = lower_is_better
        path = folder / RECORD_FILE
        if path.exists():
            self._read(path)
            self._read_scores()
            self._write()
        else:
            make_folder(folder)

    def has(self, name: str, digest: str) -> bool:
        """Whether this very checkpoint has been measured."""
        return any((each.name, each.digest) == (name, digest) for each in self.measured)

    def add(self, measured: Measured) -> Measured:
        """Note a checkpoint, on disk when this returns, and return it with its score.

        Raises:
            ConfigError: it cannot be written, or its results have no such score; it is noted all the same.
        """
        self.measured.append(measured)
        self._write()
        self._read_scores()
        self._write()
        return self.measured[-1]

    def best(self) -> Measured | None:
        """The one with the best score, of equal ones the earliest step; None where none has a score."""
        sign = 1 if self._lower_is_better else -1
        scored = [(sign * each.score, each.step, each) for each in self.measured if each.score is not None]
        return min(scored, key=lambda entry: entry[:2])[2] if scored else None

    def _read(self, path: Path) -> None:
        content = read_json_object(path, error=ConfigError)
        for name, ours in self._facts.items():
            if content.get(name) != ours:
                raise ConfigError(
                    f"--out: {self.folder} holds a record with {name} {content.get(name)!r} instead of "
                    f"{ours!r}; choose another folder."
                )
        try:
            self.measured = [Measured(**entry) for entry in content["checkpoints"]]
        except (KeyError, TypeError):
            raise ConfigError(
                f"{path}: is no record of measured checkpoints; remove it to measure all anew."
            ) from None

    def _read_scores(self) -> None:
        if self._score is None:
            self.measured = [replace(each, score=None) for each in self.measured]
            return
        scored = []
        for each in self.measured:
            path = self.folder / each.folder / RESULTS_FILE
            score = score_of(read_json_object(path, error=ConfigError), self._score, path=path)
            scored.append(replace(each, score=score))
        self.measured = scored

    def _write(self) -> None:
        best = self.best()
        content = {
            "kind": _KIND,
            "version": 1,
            **self._facts,
            "score": self._score,
            "lower_is_better": self._lower_is_better,
            "best": None if best is None else asdict(best),
            "checkpoints": [asdict(each) for each in self.measured],
        }
        path = self.folder / RECORD_FILE
        try:
            with replacing(path) as partial:
                write_json(partial, content)
        except OSError as error:
            raise unwritable(path, error) from None


def score_of(results: Mapping[str, Any], key: str, *, path: Path) -> float | None:
    """A number of results.json by its keys, with dots between them; None where it is null.

    Raises:
        ConfigError: there is no such number; the message names those that there are.
    """
    value: Any = results
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _no_score(results, key, path)
        value = value[part]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _no_score(results, key, path)
    return float(value)


def _no_score(results: Mapping[str, Any], key: str, path: Path) -> ConfigError:
    names = _numbers(results.get("scores", {}), "scores")
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    known = ", ".join(names[:_MAX_NAMED]) + more
    return ConfigError(f"--score: {key} is no number of {path}; it has {known or 'no scores'}.")


def _numbers(value: Any, name: str) -> list[str]:
    if isinstance(value, dict):
        return [found for key, part in value.items() for found in _numbers(part, f"{name}.{key}")]
    is_number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    return [name] if is_number else []
