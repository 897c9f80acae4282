"""Training one arm: AdamW with OneCycle, on one rate or a faster one for the gates, within a budget of time.

Shapes: B sequences, T positions.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from experiments.recall.tasks import Task
from finetune.args import OptimArgs, TrainArgs, TTTArgs
from finetune.training.optim import build_optimizer, build_scheduler

_EVAL_BATCH = 32


@dataclass(frozen=True)
class Schedule:
    """How long and how fast an arm trains.

    Attributes:
        num_steps: optimiser steps.
        batch_size: sequences per step.
        lr: peak outer rate of all weights.
        alpha_lr_multiplier: the gates' rate relative to it.
        eval_every: steps between evaluations.
        num_eval: held-out sequences of an evaluation.
        budget_min: minutes after which a run stops where it is; None: no limit.
    """

    num_steps: int = 1600
    batch_size: int = 16
    lr: float = 4e-3
    alpha_lr_multiplier: float = 1.0
    eval_every: int = 200
    num_eval: int = 128
    budget_min: float | None = None


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Attributes:
        step: optimiser steps done.
        loss: mean over the scored positions of held-out sequences, nats.
        by_position: mean over held-out sequences, `[T]`.
        minutes: since the start of the run.
    """

    step: int
    loss: float
    by_position: Tensor
    minutes: float


def train(lm: LMModel, task: Task, schedule: Schedule, *, seed: int) -> Iterator[Point]:
    """Train in place; yields the evaluations, the last one after the last step or when the time is over.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    args = TrainArgs(
        full_finetuning=True,
        max_steps=schedule.num_steps,
        optim=OptimArgs(lr=schedule.lr, pct_start=0.1),
        ttt=TTTArgs(weight_lr_multiplier=1.0, alpha_lr_multiplier=schedule.alpha_lr_multiplier),
    )
    optimizer = build_optimizer(lm, args)
    scheduler = build_scheduler(optimizer, args)
    generator = torch.Generator().manual_seed(seed)
    start = time.monotonic()
    for step in range(1, schedule.num_steps + 1):
        codes = task.batch(schedule.batch_size, generator)
        loss = task.losses(lm, codes).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"loss {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step < schedule.num_steps:
            scheduler.step()
        minutes = (time.monotonic() - start) / 60
        is_over = schedule.budget_min is not None and minutes > schedule.budget_min
        if step % schedule.eval_every == 0 or step == schedule.num_steps or is_over:
            by_position = evaluate(lm, task, schedule)
            yield Point(step, by_position[task.scored].mean().item(), by_position, minutes)
        if is_over:
            return


@torch.no_grad()
def evaluate(lm: LMModel, task: Task, schedule: Schedule) -> Tensor:
    """Mean loss by position over held-out sequences, the same for all arms and seeds. `[T]`."""
    lm.eval()
    generator = torch.Generator().manual_seed(2**31)
    parts = [
        task.losses(lm, task.batch(min(_EVAL_BATCH, schedule.num_eval - first), generator, held_out=True))
        for first in range(0, schedule.num_eval, _EVAL_BATCH)
    ]
    lm.train()
    return torch.cat(parts).mean(0)
