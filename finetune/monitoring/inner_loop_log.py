"""Inner-loop loss trajectories on disk ("Figure 5" of the TTT paper), per layer and frame.

Shapes: T frames of a chunk.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.args import TTTArgs
from finetune.distributed import is_main
from finetune.errors import ConfigError, DataError
from finetune.files import finite_or_null, writing_to

INNER_LOSSES_FILE = "inner_loop_losses.jsonl"
_STEP = re.compile(r'\{"step": (\d{1,18}), ')  # what a record starts with


class InnerLossRecord(NamedTuple):
    """One record of a run."""

    step: int
    losses: dict[int, Tensor]  # by layer, [3, T] float32, NaN where no row of the batch taught anything


class InnerLoopLog:
    """Writes `inner_loop_losses.jsonl` when `ttt.log_inner_loop_losses` is set.

    Each record has the step and, per layer, the losses at `W0`, before and after each frame's own step.
    """

    def __init__(self, run_dir: Path, args: TTTArgs) -> None:
        self._path = run_dir / INNER_LOSSES_FILE
        self._enabled = args.enable and args.log_inner_loop_losses and is_main()
        self._interval = args.inner_loop_log_interval

    def is_due(self, step: int) -> bool:
        """Whether this step gets a record."""
        return self._enabled and step % self._interval == 0

    def write(self, step: int, trajectories: Mapping[int, Tensor]) -> None:
        """Append a record when one is due.

        Args:
            step: optimiser steps done.
            trajectories: layer to losses `[3, T]`; NaN where no row of the batch teaches anything.

        Raises:
            UserError: it cannot be written.
        """
        if not self.is_due(step):
            return
        layers = {
            index: [[finite_or_null(value) for value in row] for row in losses.tolist()]
            for index, losses in trajectories.items()
        }
        with writing_to(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")


def read_inner_losses(path: Path, step: int | None = None) -> InnerLossRecord:
    """A record of a run; a last line that was cut off does not count.

    Args:
        path: of the `inner_loop_losses.jsonl`.
        step: whose record, None: the last.

    Raises:
        ConfigError: the file does not exist, or has no record of the step.
        DataError: it is damaged.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {'is not a file' if path.exists() else 'does not exist'}.")
    found: tuple[int, str] | None = None
    steps: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                break
            start = _STEP.match(line)
            if start is None:
                raise DataError(f"{path}: line {number} is not a record of inner losses.")
            steps.append(int(start[1]))
            if step in (None, steps[-1]):
                found = steps[-1], line
    if not steps:
        raise ConfigError(f"{path}: has no record yet.")
    if found is None:
        raise ConfigError(f"--step: {path} has no record of step {step}, only of {_listed(steps)}.")
    step, record = found
    try:
        losses = {int(index): _losses(rows) for index, rows in json.loads(record)["layers"].items()}
        if not losses or min(losses) < 0:
            raise ValueError(list(losses))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        raise DataError(f"{path}: the record of step {step} is damaged.") from None
    return InnerLossRecord(step, dict(sorted(losses.items())))


def _losses(rows: list[list[float | None]]) -> Tensor:
    losses = torch.tensor([[math.nan if value is None else value for value in row] for row in rows])
    if losses.dim() != 2 or len(losses) != 3:
        raise ValueError(losses.shape)
    return losses


def _listed(steps: list[int]) -> str:
    if len(steps) <= 6:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:3]))}, … {steps[-1]} ({len(steps)} records)"
