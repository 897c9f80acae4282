"""When a run saves, and what an error in saving does to it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from finetune.args import TrainArgs
from finetune.checkpointing import Checkpointer
from finetune.config_io import public_values
from finetune.distributed import get_world_size, is_main
from finetune.errors import CheckpointError
from finetune.resume import global_batch
from finetune.train_state import TrainState

logger = logging.getLogger(__name__)


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
    def _errors_allowed(self, allowed: bool) -> Iterator[None]:
        """Let training go on after a checkpoint that could not be written, where it may."""
        try:
            yield
        except CheckpointError as error:
            if not allowed or self._args.ckpt_on_error == "stop":
                raise
            if is_main():
                logger.error("%s Training goes on (ckpt_on_error: continue).", error)
