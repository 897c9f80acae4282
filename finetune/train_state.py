"""Everything that changes while a run trains, and so all that a resume needs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moshi.models.lm import LMModel
from torch import Tensor
from torch.optim import AdamW

from finetune.checkpointing import ResumeState
from finetune.distributed import gather_objects
from finetune.monitoring.ttt_metrics import GateMonitor
from finetune.resume import ResumePoint
from finetune.training_memory import TrainingMemory
from finetune.training_state import collect_state, load_state


@dataclass
class TrainState:
    """Where a run stands; the outer learning rates follow from the step.

    Attributes:
        model, optimizer: in training.
        memory: carried from chunk to chunk, None where nothing is.
        gates: know how the gates were at the start of the run.
        step: optimiser steps done.
        num_samples: chunks seen, by all processes.
        eval_loss: of the evaluation after this step, None without one.
        best_eval: step and loss of the best evaluation so far.
    """

    model: LMModel
    optimizer: AdamW
    memory: TrainingMemory | None
    gates: GateMonitor
    step: int = 0
    num_samples: int = 0
    eval_loss: float | None = None
    best_eval: Mapping[str, float] | None = None

    def advance(self, num_samples: int) -> None:
        """Count a step that has been made."""
        if self.memory is not None:
            self.memory.commit()
        self.step += 1
        self.num_samples += num_samples
        self.eval_loss = None

    def record_evaluation(self, loss: float) -> None:
        """Remember an evaluation after the current step."""
        if not math.isfinite(loss):
            return
        self.eval_loss = loss
        if self.best_eval is None or loss < self.best_eval["loss"]:
            self.best_eval = {"step": self.step, "loss": loss}

    def to_save(self, facts: Mapping[str, Any]) -> ResumeState:
        """The state for a checkpoint; every process must call it.

        Args:
            facts: what else `resume.json` tells.
        """
        places = {} if self.memory is None else self.memory.places()
        own = {
            "step": self.step,
            "num_samples": self.num_samples,
            "eval_loss": self.eval_loss,
            "best_eval": self.best_eval,
            "memory": {lane: place for part in gather_objects(places) for lane, place in part.items()},
        }
        tensors = collect_state(self.model, self.optimizer, self._other_tensors())
        return ResumeState(tensors, {**own, **facts})

    def restore(self, point: ResumePoint, lanes: set[int]) -> None:
        """Go on where a checkpoint stopped; every process must call it.

        Args:
            point: the checkpoint.
            lanes: those of this process.

        Raises:
            CheckpointError: its training state does not fit.
        """
        self.step = point.step
        self.num_samples = int(point.facts["num_samples"])
        self.best_eval = point.facts["best_eval"]
        if self.memory is not None:
            places = {int(lane): tuple(place) for lane, place in point.facts["memory"].items()}
            self.memory.restore({lane: place for lane, place in places.items() if lane in lanes})
        others = self._other_tensors()
        load_state(point.state_dir, self.model, self.optimizer, others, source=str(point.folder))

    def _other_tensors(self) -> dict[str, Tensor]:
        tensors = {f"gate.{index}": gate for index, gate in self.gates.start.items()}
        if self.memory is not None:
            tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.tensors().items()}
        return tensors
