"""Which runs make up each experiment."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.recall.arms import ARMS, ArmName, Settings
from experiments.recall.speech import SpeechTask
from experiments.recall.tasks import PatternTask, Task

FIRST_LAYER_STDS = (0.02, 0.1, 0.3, 1.0, 2.0)
HEAD_DIMS = (16, 64, 128)
# The pattern of the study of initialisations: a quarter of the work of the full-size one.
SMALL_PATTERN = PatternTask(num_symbols=24, period=32, num_tokens=96, window=8)

ABLATIONS: dict[str, dict[str, Any]] = {
    "as-is": {},
    "mini_batch-1": {"mini_batch_size": 1},
    "mini_batch-1.base_lr-0.625": {"mini_batch_size": 1, "base_lr": 0.625},  # a token's step as it is
    "mini_batch-4": {"mini_batch_size": 4},
    "mini_batch-64": {"mini_batch_size": 64},
    "base_lr-0.1": {"base_lr": 0.1},
    "base_lr-1": {"base_lr": 1.0},
    "base_lr-100": {"base_lr": 100.0},
    "inner_layers-1": {"ttt_mlp_layers": 1},
    "inner_layers-3": {"ttt_mlp_layers": 3},
    "init-published": {"inner_init": "published"},
    "projections-0.02": {"projection_std": 0.02},
    "alpha-0.1": {"initial_gating_alpha": 0.1},
    "one-layer": {"layers": "1"},
    "outer-rate-2e-3": {"lr": 2e-3},
}
GATES: dict[str, dict[str, Any]] = {
    "alpha-1": {},
    "alpha-0.1": {"initial_gating_alpha": 0.1},
    "alpha-0.1.gates-10": {"initial_gating_alpha": 0.1, "alpha_lr_multiplier": 10.0},
    "alpha-0.005": {"initial_gating_alpha": 0.005},
    "alpha-0.005.gates-10": {"initial_gating_alpha": 0.005, "alpha_lr_multiplier": 10.0},
    "alpha-0.005.gates-10.base_lr-0.1": {
        "initial_gating_alpha": 0.005,
        "alpha_lr_multiplier": 10.0,
        "base_lr": 0.1,
    },
}
OF_THE_SCHEDULE = ("lr", "alpha_lr_multiplier")


@dataclass(frozen=True)
class Plan:
    """A run to make, seeds apart.

    Attributes:
        label: names it within its experiment.
        arm, task, settings: what is trained.
        schedule: what of the schedule it changes.
    """

    label: str
    arm: ArmName
    task: Task
    settings: Settings = field(default_factory=Settings)
    schedule: Mapping[str, Any] = field(default_factory=dict)


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


def _changed(changes: Mapping[str, Mapping[str, Any]]) -> Iterator[Plan]:
    """TTT as in the other experiments, with the changes of each label, and the arms of the gap's ends."""
    for arm in ("window", "full"):
        yield Plan(arm, arm, SMALL_PATTERN)
    default = Settings()
    for label, changed in changes.items():
        schedule = {name: value for name, value in changed.items() if name in OF_THE_SCHEDULE}
        ttt = {name: value for name, value in changed.items() if name not in (*schedule, "projection_std")}
        settings = replace(default, ttt={**default.ttt, **ttt}, projection_std=changed.get("projection_std"))
        yield Plan(label, "window_ttt", SMALL_PATTERN, settings, schedule)


def _pattern_of(head_dim: int) -> PatternTask:
    """The small pattern in a transformer of width 64, or of the width of one head where that is more.

    Width 64 has four heads of 16 or one of 64; width 128 has one head. Attention has as many.
    """
    dim = max(SMALL_PATTERN.dim, head_dim)
    return replace(SMALL_PATTERN, dim=dim, num_heads=dim // head_dim)


EXPERIMENTS: dict[str, Experiment] = {
    "pattern": Experiment(lambda demo: _arms(PatternTask()), 1600, "token"),
    "speech": Experiment(lambda demo: _arms(SpeechTask(demo)), 1500, "frame (80 ms)"),
    "speech-long": Experiment(lambda demo: _arms(_long_speech(demo)), 2000, "frame (80 ms)"),
    "ablation": Experiment(lambda demo: _changed(ABLATIONS), 1000, "token"),
    "gate": Experiment(lambda demo: _changed(GATES), 3000, "token"),
    "init": Experiment(lambda demo: _initialisations(), 1000, "token"),
}


def _long_speech(demo: Path) -> SpeechTask:
    """A passage of 7.7 s in four codebooks, heard twice."""
    return SpeechTask(demo, num_codebooks=4, period=96, num_frames=192, window=16)


def plans_of(experiment: str, *, demo: Path) -> list[Plan]:
    """The runs of one experiment."""
    return list(EXPERIMENTS[experiment].plans(demo))
