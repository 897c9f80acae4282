"""Which runs make up each experiment."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.recall.arms import ARMS, ArmName, Settings
from experiments.recall.speech import SpeechTask
from experiments.recall.tasks import PatternTask, Task

FIRST_LAYER_STDS = (0.02, 0.1, 0.3, 1.0, 2.0)
HEAD_DIMS = (16, 64, 128)
# The pattern of the study of initialisations: a quarter of the work of the full-size one.
SMALL_PATTERN = PatternTask(num_symbols=24, period=32, num_tokens=96, window=8)


@dataclass(frozen=True)
class Plan:
    """A run to make, seeds apart.

    Attributes:
        label: names it within its experiment.
        arm, task, settings: what is trained.
    """

    label: str
    arm: ArmName
    task: Task
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Experiment:
    """A set of runs that belong together.

    Attributes:
        plans: makes the list; the argument is the folder of the demo's recordings.
        num_steps: optimiser steps of each run.
        unit: of the positions in a sequence.
    """

    plans: Callable[[Path], Iterator[Plan]]
    num_steps: int
    unit: str


def _arms(task: Task) -> Iterator[Plan]:
    for arm in ARMS:
        yield Plan(arm, arm, task)


def _initialisations() -> Iterator[Plan]:
    """TTT with first inner layers of several scales and the published initialisation, by head_dim.

    With the two arms that the share of the gap is measured by.
    """
    for head_dim in HEAD_DIMS:
        task = _pattern_of(head_dim)
        for arm in ("window", "full"):
            yield Plan(f"d{head_dim}.{arm}", arm, task)
        default = Settings()
        for std in FIRST_LAYER_STDS:
            settings = replace(default, first_layer_std=std)
            yield Plan(f"d{head_dim}.std{std:g}", "window_ttt", task, settings)
        published = replace(default, ttt={**default.ttt, "inner_init": "published"})
        yield Plan(f"d{head_dim}.published", "window_ttt", task, published)


def _pattern_of(head_dim: int) -> PatternTask:
    """The small pattern in a transformer of width 64, or of the width of one head where that is more.

    Width 64 has four heads of 16 or one of 64; width 128 has one head. Attention has as many.
    """
    dim = max(SMALL_PATTERN.dim, head_dim)
    return replace(SMALL_PATTERN, dim=dim, num_heads=dim // head_dim)


EXPERIMENTS: dict[str, Experiment] = {
    "pattern": Experiment(lambda demo: _arms(PatternTask()), 1600, "token"),
    "speech": Experiment(lambda demo: _arms(SpeechTask(demo)), 1000, "frame (80 ms)"),
    "init": Experiment(lambda demo: _initialisations(), 1000, "token"),
}


def plans_of(experiment: str, *, demo: Path) -> list[Plan]:
    """The runs of one experiment."""
    return list(EXPERIMENTS[experiment].plans(demo))
