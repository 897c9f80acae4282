"""One run: a base fine-tuned in one way, and what it recalls then."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from experiments.fine_tuning.studies import Plan
from experiments.fine_tuning.training import fine_tune, recall_loss, recall_losses
from experiments.models import mean_gates, num_parameters
from experiments.stored_runs import stored_run


def run(folder: Path, plan: Plan, *, seed: int, bases: Path, num_steps: int | None = None) -> dict[str, Any]:
    """Train and measure, or read what is there.

    Args:
        folder: of the study's files.
        plan: what to do.
        seed: of base, fresh weights and sequences.
        bases: folder of the trained base models.
        num_steps: instead of the plan's.

    Raises:
        UserError: the folder has a run of this label and seed that is damaged or has other settings.
        StateError: it cannot be written.
    """
    num_steps = num_steps or plan.arm.num_steps
    description = {
        "arm": dataclasses.asdict(plan.arm) | {"num_steps": num_steps, "meaning": None},
        "ttt": dataclasses.asdict(plan.arm.ttt_args),
        "task": type(plan.task).__name__,
        "of the task": dataclasses.asdict(plan.task),
        "seed": seed,
    }
    path = folder / f"{plan.arm.label}.seed{seed}.json"
    return stored_run(path, description, lambda: _compute(plan, seed, bases, num_steps))


def _compute(plan: Plan, seed: int, bases: Path, num_steps: int) -> dict[str, Any]:
    lm = plan.arm.build(plan.task.num_tokens_known, bases=bases, seed=seed)
    start = time.monotonic()
    curve = fine_tune(lm, plan.task, plan.arm.ttt_args, num_steps=num_steps, seed=seed)
    result: dict[str, Any] = {
        "num_parameters": num_parameters(lm),
        "curve": [round(loss, 4) for loss in curve],
        "minutes": round((time.monotonic() - start) / 60, 2),
        "gates": mean_gates(lm),
    }
    streams = plan.arm.variant is None
    if plan.difficulties:
        losses = recall_losses(lm, plan.task, plan.difficulties, streams=streams)
        return result | {"losses": {str(number): round(loss, 5) for number, loss in losses.items()}}
    loss, by_position = recall_loss(lm, plan.task, streams=streams)
    return result | {"loss": round(loss, 5), "by_position": [round(x, 4) for x in by_position.tolist()]}
