"""Losses of several models and arms on the same frames: means by position, differences, intervals."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.human_speech.recordings import REACH
from finetune.evaluation.long_context.measure import KIND
from finetune.evaluation.long_context.statistics import Bootstrap, Estimate, differences, mean_ratio
from finetune.evaluation.long_context.stream_losses import StreamLosses
from finetune.evaluation.out_folder import RESULTS_FILE
from finetune.files import read_json_object
from moshi_ttt.files.state_file import StateFile

METRICS = ("audio", "text")

_EDGES = (0, REACH, 250, 500, 1000, None)
SPANS = (*itertools.pairwise(_EDGES), (REACH, None))  # positions in frames; the last are all beyond reach

_RESAMPLES = 2000

Losses = dict[str, dict[str, np.ndarray]]  # metric -> recording -> [N], nats, NaN without a target


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: of an arm or a difference.
        estimates: of each of `SPANS`.
        is_difference: of the first arm to another, negative where the first is better.
    """

    name: str
    estimates: list[Estimate]
    is_difference: bool


def read_losses(folder: Path, arm: str) -> Losses:
    """What `evaluate.py long-context` measured of a model in an arm.

    Args:
        folder: its output.
        arm: `on`, `frozen`, `off`, or `plain` of a model without TTT.
    """
    losses: Losses = {metric: {} for metric in METRICS}
    for recording in read_json_object(folder / RESULTS_FILE)["data"]["recordings"]:
        tensors = StateFile(folder / recording["files"][arm], kind=KIND).read()
        metrics = StreamLosses(tensors["text"], tensors["audio"], int(tensors["resets"])).metrics()
        for metric in METRICS:
            losses[metric][recording["name"]] = metrics[metric].numpy().astype(float)
    return losses


def mean_over_seeds(seeds: Sequence[Losses]) -> Losses:
    """The mean loss of every frame."""
    first = seeds[0]
    return {
        metric: {name: np.mean([seed[metric][name] for seed in seeds], axis=0) for name in first[metric]}
        for metric in METRICS
    }


def rows(arms: Mapping[str, Losses], metric: str) -> list[Row]:
    """Means of every arm, then the first arm minus each other one, with intervals over recordings."""
    first, *others = arms
    names = list(arms[first][metric])
    by_arm = {arm: [losses[metric][name] for name in names] for arm, losses in arms.items()}
    means = [Row(arm, _by_position(recordings), False) for arm, recordings in by_arm.items()]
    compared = {other: differences(by_arm[first], by_arm[other]) for other in others}
    return means + [Row(f"{first} - {other}", _by_position(each), True) for other, each in compared.items()]


def _by_position(recordings: Sequence[np.ndarray]) -> list[Estimate]:
    bootstrap = Bootstrap(_RESAMPLES, seed=0)
    return [
        bootstrap.estimate(mean_ratio([losses[start:stop] for losses in recordings])) for start, stop in SPANS
    ]
