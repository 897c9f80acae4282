"""Inner-loop loss trajectories on disk ("Figure 5" of the TTT paper), per layer and frame.

Shapes: T frames of a chunk.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from finetune.args import TTTArgs
from finetune.distributed import is_main
from finetune.files import finite_or_null
from finetune.monitoring.plots import INNER_LOSSES_FILE


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
            trajectories: layer to losses `[3, T]`; NaN where every row of the batch is padding.
        """
        if not self.is_due(step):
            return
        layers = {
            index: [[finite_or_null(value) for value in row] for row in losses.tolist()]
            for index, losses in trajectories.items()
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")
