"""Everything that changes while a run trains, so all that a resume needs, and when it is saved."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moshi.models.lm import LMModel
from torch import Tensor
from torch.optim import AdamW

from finetune.args import TrainArgs
from finetune.checkpoint.resume_check import ResumePoint, global_batch
from finetune.checkpoint.resume_tensors import collect_state, load_state
from finetune.checkpointing import Checkpointer, ResumeState
from finetune.config_io import public_values
from finetune.distributed import gather_objects, get_world_size, is_main
from finetune.errors import CheckpointError
from finetune.monitoring.ttt_metrics import GateMonitor
from finetune.training.carried_memory import CarriedMemory

logger = logging.getLogger(__name__)


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
        frozen: names of parameters that do not train and are not those of the base model.
    """

    model: LMModel
    optimizer: AdamW
    memory: CarriedMemory | None
    gates: GateMonitor
    step: int = 0
    num_samples: int = 0
    eval_loss: float | None = None
    best_eval: Mapping[str, float] | None = None
    frozen: Sequence[str] = ()

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
        tensors = collect_state(self.model, self.optimizer, self._other_tensors(), frozen=self.frozen)
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
        load_state(
            point.state_dir,
            self.model,
            self.optimizer,
            others,
            frozen=self.frozen,
            source=str(point.folder),
        )

    def _other_tensors(self) -> dict[str, Tensor]:
        tensors = {f"gate.{index}": gate for index, gate in self.gates.start.items()}
        if self.memory is not None:
            tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.tensors().items()}
        return tensors


class Saver:
    """Saves the checkpoints of a training; every process has one.

    Args:
        args: the configuration.
        checkpointer: None when nothing is saved.
        facts: about data and base model, for `resume.json`.
    """

    def __init__(self, args: TrainArgs, checkpointer: Checkpointer | None, facts: Mapping[str, Any]) -> None:
        self.active = checkpointer is not None
        self._args = args
        self._checkpointer = checkpointer
        self._facts = {
            "args": public_values(args),
            "global_batch": global_batch(args),
            "num_processes": get_world_size(),
            **facts,
        }
        self._saved_step: int | None = None

    def save(self, state: TrainState, *, last: bool, wandb_run_id: str | None = None) -> None:
        """Save, unless this step is saved already.

        Args:
            state: of the training.
            last: nothing comes after it, so that it must succeed.
            wandb_run_id: of the W&B run, for `resume.json`.

        Raises:
            CheckpointError: it cannot be written, and training shall not go on without.
        """
        if self._checkpointer is None or self._saved_step == state.step:
            return
        self.finish(last=False)
        with self._errors_allowed(not last):
            to_save = state.to_save(self._facts | {"wandb_run_id": wandb_run_id})
            self._checkpointer.save(state.model, state.step, to_save)
            self._saved_step = state.step

    def finish(self, *, last: bool) -> None:
        """Wait for what is written in the background; arguments and errors as in `save`."""
        if self._checkpointer is not None:
            with self._errors_allowed(not last):
                self._checkpointer.finish()

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Context whose errors wait for what is written in the background; interruptions do not."""
        try:
            yield
        except Exception:
            try:
                self.finish(last=True)
            except CheckpointError as error:
                logger.error("%s", error)
            raise

    @contextmanager
    def _errors_allowed(self, allowed: bool) -> Iterator[None]:
        """Let training go on after a checkpoint that could not be written, where it may."""
        try:
            yield
        except CheckpointError as error:
            if not allowed or self._args.ckpt_on_error == "stop":
                raise
            if is_main():
                logger.error("%s Training goes on (ckpt_on_error: continue).", error)
