"""One file per run: what was trained, how it went; runs that are there already are not trained again."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.models import mean_gates, num_parameters
from experiments.recall.arms import build_arm
from experiments.recall.studies import Plan
from experiments.recall.training import Schedule, train
from finetune.errors import DataError, UserError
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.state_file import check_writable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A trained arm.

    Attributes:
        description: everything that decides the outcome.
        steps, losses, minutes: of the evaluations.
        by_position: loss of the last evaluation by position, nats.
        num_parameters: of the model.
        gates: mean |tanh alpha| of each TTT layer at the end.
        problem: why the run ended early, None when it did not.
    """

    description: Mapping[str, Any]
    steps: list[int]
    losses: list[float]
    minutes: list[float]
    by_position: list[float]
    num_parameters: int
    gates: dict[str, float]
    problem: str | None

    @property
    def loss(self) -> float:
        """At the end; NaN when the training failed before the first evaluation."""
        return self.losses[-1] if self.losses else math.nan


def run_arm(folder: Path, plan: Plan, schedule: Schedule, *, seed: int) -> Run:
    """Train an arm, or read what it did when it is in the folder already.

    A run that was out of time is trained again where there is more time now.

    Args:
        folder: of the files, made where it does not exist.
        plan, schedule, seed: what to train.

    Raises:
        UserError: the folder has a run of this label and seed that is damaged or has other settings.
        StateError: it cannot be written.
    """
    schedule = replace(schedule, **plan.schedule)
    path = folder / f"{plan.label}.seed{seed}.json"
    description = {
        "arm": plan.arm,
        "task": dict(plan.task.identity),
        "settings": asdict(plan.settings),
        "schedule": _described(schedule),
        "seed": seed,
    }
    description = json.loads(json.dumps(description))
    if path.is_file():
        run = read_run(path)
        if run.description != description:
            raise UserError(f"{path}: is a run with other settings; give another --out, or remove it.")
        if not _has_more_time(run, schedule):
            return run
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(path)  # before hours of training, not after
    run = _train(plan, schedule, seed=seed, description=description)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(run)) + "\n")
    return run


def _described(schedule: Schedule) -> dict[str, Any]:
    description = asdict(schedule)
    del description["budget_min"]
    if schedule.alpha_lr_multiplier == 1:  # files from before it could be another
        del description["alpha_lr_multiplier"]
    return description


def read_run(path: Path) -> Run:
    """A run from its file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        run = Run(**json.loads(path.read_text(encoding="utf-8")))
        if len({len(run.steps), len(run.losses), len(run.minutes)}) > 1 or "seed" not in run.description:
            raise ValueError(path)
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{path}: is damaged or no run; remove it, the run is made again.") from None
    return run


def _train(plan: Plan, schedule: Schedule, *, seed: int, description: Mapping[str, Any]) -> Run:
    lm = build_arm(plan.arm, plan.task, plan.settings, seed=seed)
    points, problem = [], None
    try:
        for point in train(lm, plan.task, schedule, seed=seed):
            points.append(point)
            logger.info("%s seed %d step %d: loss %.4f", plan.label, seed, point.step, point.loss)
    except FloatingPointError as error:
        problem = str(error)
    if problem is None and points[-1].step < schedule.num_steps:
        problem = f"out of time after {points[-1].step} of {schedule.num_steps} steps"
    return Run(
        description,
        [point.step for point in points],
        [round(point.loss, 6) for point in points],
        [round(point.minutes, 2) for point in points],
        [round(loss, 4) for loss in points[-1].by_position.tolist()] if points else [],
        num_parameters(lm),
        mean_gates(lm),
        problem,
    )


def _has_more_time(run: Run, schedule: Schedule) -> bool:
    if run.problem is None or not run.problem.startswith("out of time"):
        return False
    return schedule.budget_min is None or schedule.budget_min > run.minutes[-1]
