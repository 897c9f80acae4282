"""The scores of finished items, a line of a file each, so that an interrupted measurement goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.evaluation.out_folder import unwritable
from finetune.evaluation.recall.engine import AnswerScores

Scores = dict[int, AnswerScores]  # of an item, by lag


class ScoreFile:
    """Scores by item, arm, lag and content; what is there already is not measured again.

    Args:
        path: of the file, which need not exist; what in it cannot be read is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[str, str], dict[int, AnswerScores]] = {}
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
            try:
                record = json.loads(line)
                key = (record["arm"], record["digest"])
                scores = {int(lag): _read(values) for lag, values in record["lags"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # the line in which an earlier measurement was interrupted
            self._known.setdefault(key, {}).update(scores)

    def find(self, arm: str, digest: str, lags: Sequence[int]) -> Scores | None:
        """What was measured before, None where a lag is missing."""
        known = self._known.get((arm, digest), {})
        return {lag: known[lag] for lag in lags} if all(lag in known for lag in lags) else None

    def add(self, arm: str, digest: str, name: str, scores: Scores) -> None:
        """Keep the scores of an item.

        Raises:
            ConfigError: they cannot be written.
        """
        self._known.setdefault((arm, digest), {}).update(scores)
        lags = {str(lag): _written(value) for lag, value in scores.items()}
        line = json.dumps({"item": name, "arm": arm, "digest": digest, "lags": lags})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # what an interrupted line left must not swallow this one
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from None


def _written(scores: AnswerScores) -> dict[str, list[list[float]]]:
    return {name: value.tolist() for name, value in scores._asdict().items()}


def _read(values: Mapping[str, Any]) -> AnswerScores:
    tensors = {name: _matrix(values[name]) for name in AnswerScores._fields}
    return AnswerScores(**tensors)


def _matrix(values: Any) -> Tensor:
    matrix = np.array(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
        raise ValueError("no scores")
    return torch.from_numpy(matrix)
