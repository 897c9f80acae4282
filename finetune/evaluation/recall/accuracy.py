"""What scores say: how often the right answer is the likeliest, and by how much.

Shapes: K answers of an item, G items.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.recall.engine import AnswerScores
from finetune.evaluation.recall.items import Group

MEASURES = AnswerScores._fields  # text, semantic, audio


class Measured(NamedTuple):
    """An item with its scores by lag."""

    group: Group
    scores: dict[int, AnswerScores]


def correct(scores: Tensor) -> float:
    """In how many of K conversations the right answer is the likeliest; of M equal ones each counts 1/M.

    For a model that does not know the conversations apart this is 1, whatever it prefers.

    Args:
        scores: `[K, K]`, of answer j in conversation i.
    """
    best = scores == scores.max(1, keepdim=True).values
    return float((best.diagonal() / best.sum(1)).sum())


def margins(scores: Tensor) -> float:
    """Sum over the conversations of what the right answer has more than the mean of the others, nats."""
    right = scores.diagonal()
    wrong = (scores.sum(1) - right) / (scores.shape[1] - 1)
    return float((right - wrong).sum())


def summarise(
    measured: Sequence[Measured], lag: int, measure: str, bootstrap: RatioBootstrap
) -> dict[str, Any]:
    """Accuracy, chance and margin of items at a lag, with 95 % intervals over items.

    `told_apart` is the share of answers that are likeliest in the conversation where they are right: unlike
    the accuracy it does not suffer from answers that are likelier than others everywhere, short ones for
    example.

    Args:
        measured: at least one item.
        lag: in frames.
        measure: of `MEASURES`.
        bootstrap: for the intervals, which are None with fewer than two items.
    """
    hits, gains, counts = _sums(measured, lag, measure)
    apart = np.array([correct(getattr(item.scores[lag], measure).mT) for item in measured])
    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "interval": bootstrap.interval(hits, counts),
        "chance": float(len(measured) / counts.sum()),
        "told_apart": float(apart.sum() / counts.sum()),
        "told_apart_interval": bootstrap.interval(apart, counts),
        "margin": float(gains.sum() / counts.sum()),
        "margin_interval": bootstrap.interval(gains, counts),
        "num_items": len(measured),
        "num_conversations": int(counts.sum()),
    }


def paired(
    first: Sequence[Measured], second: Sequence[Measured], lag: int, measure: str, bootstrap: RatioBootstrap
) -> dict[str, Any]:
    """What the first measurement has more than the second on the same items: accuracy and margin.

    Raises:
        ValueError: they are not of the same items.
    """
    if [one.group.name for one in first] != [two.group.name for two in second]:
        raise ValueError("not the same items")
    hits, gains, counts = _sums(first, lag, measure)
    other_hits, other_gains, _ = _sums(second, lag, measure)
    return {
        "accuracy": float((hits - other_hits).sum() / counts.sum()),
        "interval": bootstrap.interval(hits - other_hits, counts),
        "margin": float((gains - other_gains).sum() / counts.sum()),
        "margin_interval": bootstrap.interval(gains - other_gains, counts),
    }


def _sums(measured: Sequence[Measured], lag: int, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right answers, margins and conversations of each item, `[G]`."""
    scores = [getattr(item.scores[lag], measure) for item in measured]
    return (
        np.array([correct(matrix) for matrix in scores]),
        np.array([margins(matrix) for matrix in scores]),
        np.array([float(len(matrix)) for matrix in scores]),
    )


def is_finite(scores: dict[int, AnswerScores]) -> bool:
    """Whether all of an item's scores are numbers."""
    return all(bool(torch.isfinite(tensor).all()) for value in scores.values() for tensor in value)
