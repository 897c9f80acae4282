"""Which runs make up each experiment."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from experiments.recall.arms import ARMS, ArmName, Settings
from experiments.recall.tasks import PatternTask, Task

FIRST_LAYER_STDS = (0.02, 0.1, 0.3, 1.0, 2.0)
HEAD_DIMS = (16, 64, 128)


@dataclass(frozen=True)
class Plan:
    """A run to make, seeds apart.

    Attributes:
        label: names it within its experiment.
        arm, task, settings: what is trained.
        lr: peak outer rate.
    """

    label: str
    arm: ArmName
    task: Task
    settings: Settings = field(default_factory=Settings)
    lr: float = 2e-3


def arms(task: Task, settings: Settings | None = None) -> Iterator[Plan]:
    """The five arms of a task."""
    for arm in ARMS:
        yield Plan(arm, arm, task, settings or Settings())


def initialisations() -> Iterator[Plan]:
    """TTT with first inner layers of several scales and the published initialisation, by head_dim.

    With the two arms that the share of the gap is measured by.
    """
    for head_dim in HEAD_DIMS:
        task = pattern_of(head_dim)
        for arm in ("window", "full"):
            yield Plan(f"d{head_dim}.{arm}", arm, task)
        options = Settings().ttt
        for std in FIRST_LAYER_STDS:
            settings = Settings(ttt=options, first_layer_std=std)
            yield Plan(f"d{head_dim}.std{std:g}", "window_ttt", task, settings)
        published = Settings(ttt={**options, "inner_init": "published"})
        yield Plan(f"d{head_dim}.published", "window_ttt", task, published)


def pattern_of(head_dim: int) -> PatternTask:
    """The pattern task in a transformer of width 64, or of the width of one head where that is more.

    Width 64 has four heads of 16 or one of 64; width 128 has one head. Attention has as many.
    """
    task = PatternTask()
    dim = max(task.dim, head_dim)
    return replace(task, dim=dim, num_heads=dim // head_dim)
