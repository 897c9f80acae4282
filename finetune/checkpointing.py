"""Writing the checkpoints of a run: complete or not at all, verifiable, the last good one never first to go.

A checkpoint is written beside the others under a hidden name. Once every process has written its part, the
main one lists all files with their hashes, makes sure that they are on disk, and renames the folder.
"""

import errno
import logging
import os
import shutil
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from moshi.models.lm import LMModel
from safetensors import SafetensorError
from torch import Tensor

from finetune.args import TrainArgs
from finetune.checkpoint.consolidated import WeightFiles, gather_weights, write_consolidated
from finetune.checkpoint.integrity import content_files, describe_file
from finetune.checkpoint.layout import (
    CONSOLIDATED_DIR,
    DONE_FILE,
    LATEST_FILE,
    OLD_PREFIX,
    PARTIAL_PREFIX,
    PREFIX,
    RESUME_FILE,
    STATE_DIR,
    list_checkpoints,
)
from finetune.checkpoint.resume_tensors import STATE_ERRORS, copy_to_host, save_state
from finetune.distributed import gather_objects, get_rank, get_world_size, is_main
from finetune.errors import CheckpointError, one_line
from finetune.files import read_json_object, sync_to_disk, write_json
from moshi_ttt.files.atomic_file import replacing

logger = logging.getLogger(__name__)

_FULL_DISK = 1 << 20  # bytes that are left
_WRITE_ERRORS = (SafetensorError, *STATE_ERRORS)


@dataclass(frozen=True)
class ResumeState:
    """What a checkpoint needs for resuming.

    Attributes:
        tensors: of this process, see `finetune.checkpoint.resume_tensors`.
        facts: for `resume.json`, the same in every process.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class Checkpointer:
    """Writes checkpoints of one run; every process has one and calls its methods together with the others.

    Args:
        run_dir: the run directory.
        args: the configuration of the run.
        base_config: `config.json` of the base model.
        base_fingerprint: of its weights, so that adapters are not used on others; None: not known.
        frozen: parameters that do not train and are not those of the base model.
    """

    def __init__(
        self,
        run_dir: Path,
        args: TrainArgs,
        base_config: dict[str, Any],
        base_fingerprint: str | None = None,
        *,
        frozen: Collection[str] = (),
    ) -> None:
        self.folder = run_dir / "checkpoints"
        if is_main():
            _remove_leftovers(self.folder)
        self.args = args
        self.base_config = base_config
        self.base_fingerprint = base_fingerprint
        self.frozen = frozen
        # A group of its own: background writing must not mix with the collectives of training.
        self._group = dist.new_group(backend="gloo") if get_world_size() > 1 else None
        self._pending: Future[Path] | None = None

    def save(self, model: LMModel, step: int, state: ResumeState | None = None) -> Path:
        """Write checkpoint_<step>, complete or not at all, then delete old ones beyond those to keep.

        With `ckpt_async` this returns when everything is copied; an error comes with the next `save` or
        with `finish`.

        Args:
            model: whose weights are saved for use.
            step: optimiser steps done.
            state: for resuming; without it the checkpoint can only be used or started from.

        Returns:
            Its directory.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full.
        """
        self.finish()
        weights = gather_weights(model, self.args, frozen=self.frozen)
        if not self.args.ckpt_async:
            return self._write(step, weights, state)
        if state is not None:
            state = ResumeState(copy_to_host(state.tensors), state.facts)
        self._pending = self._write_in_background(step, weights, state)
        return self.folder / f"{PREFIX}{step:06d}"

    def finish(self) -> None:
        """Wait for the checkpoint that is written in the background, if there is one.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write_in_background(
        self, step: int, weights: WeightFiles, state: ResumeState | None
    ) -> Future[Path]:
        written: Future[Path] = Future()

        def write() -> None:
            try:
                written.set_result(self._write(step, weights, state))
            except BaseException as error:  # for who waits
                written.set_exception(error)

        # No executor: at exit it is waited for, and who interrupts a run twice wants to leave at once.
        threading.Thread(target=write, name=f"checkpoint_{step:06d}", daemon=True).start()
        return written

    def _write(self, step: int, weights: WeightFiles, state: ResumeState | None) -> Path:
        final = self.folder / f"{PREFIX}{step:06d}"
        partial = self.folder / f"{PARTIAL_PREFIX}{PREFIX}{step:06d}"
        try:
            with self._together():
                self._make_folders(partial)
            # One block each: an error of one process must not leave the others alone in what all do together.
            with self._together():
                if is_main():
                    self._write_main(partial, step, weights, state)
            if state is not None:
                with self._together():
                    save_state(state.tensors, partial / STATE_DIR, self._group)
            mine: dict[str, Any] = {}
            with self._together():
                mine = {n: describe_file(partial / n) for n in content_files(partial) if _is_mine(n)}
            parts = gather_objects(mine, self._group)
            with self._together():
                self._seal(partial, final, {name: file for part in parts for name, file in part.items()})
        except CheckpointError as error:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: the checkpoint cannot be written ({error}); earlier checkpoints are intact."
            ) from None
        logger.info("Saved %s", final)
        if is_main():
            self._delete_old(final)
        return final

    def _make_folders(self, partial: Path) -> None:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            (partial / CONSOLIDATED_DIR).mkdir(parents=True)

    def _write_main(self, partial: Path, step: int, weights: WeightFiles, state: ResumeState | None) -> None:
        write_consolidated(
            partial / CONSOLIDATED_DIR,
            weights,
            self.args,
            step=step,
            base_config=self.base_config,
            base_fingerprint=self.base_fingerprint,
        )
        if state is not None:
            write_json(partial / RESUME_FILE, state.facts)

    def _seal(self, partial: Path, final: Path, files: dict[str, Any]) -> None:
        """List every file with its hash, and give the folder its name."""
        if is_main():
            write_json(partial / DONE_FILE, {"files": files})
            sync_to_disk(partial)
            partial.rename(final)
            sync_to_disk(self.folder)
            with replacing(self.folder / LATEST_FILE) as latest:
                latest.write_text(f"{final.name}\n", encoding="utf-8")

    def _delete_old(self, newest: Path) -> None:
        keep = self.args.num_ckpt_keep
        if keep is None:
            return
        checkpoints = list_checkpoints(self.folder)
        kept = {*checkpoints[-keep:], newest}
        if self.args.ckpt_keep_best:
            kept.add(_best(checkpoints) or newest)
        for old in checkpoints:
            if old not in kept:
                # Renamed first: half a checkpoint must not look like a damaged one.
                doomed = old.with_name(OLD_PREFIX + old.name)
                old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A block after which all processes go on, or none: an error of one becomes one of all."""
        problem: str | None = None
        try:
            yield
        except _WRITE_ERRORS as error:
            problem = _describe(error, self.folder)
        problems = [text for text in gather_objects(problem, self._group) if text is not None]
        if problems:
            raise CheckpointError(problems[0])


def _remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed was writing or deleting."""
    for prefix in (PARTIAL_PREFIX, OLD_PREFIX):
        for path in folder.glob(f"{prefix}{PREFIX}*"):
            logger.info("Removing %s, which a run left that was killed.", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_mine(name: str) -> bool:
    """Whether this process wrote a file: the main one all but the others' shards, `__<rank>_<n>.distcp`."""
    stem = name.rpartition("/")[2]
    if not (name.startswith(f"{STATE_DIR}/__") and stem.endswith(".distcp")):
        return is_main()
    return stem.split("_")[2] == str(get_rank())


def _best(checkpoints: list[Path]) -> Path | None:
    """The checkpoint with the lowest evaluation loss, None when none was evaluated."""
    losses = {}
    for path in checkpoints:
        try:
            loss = read_json_object(path / RESUME_FILE).get("eval_loss")
        except CheckpointError:
            continue
        if isinstance(loss, float):
            losses[path] = loss
    return min(losses, key=losses.__getitem__) if losses else None


def _describe(error: BaseException, folder: Path) -> str:
    failures = getattr(error, "failures", None)
    if failures:  # torch.distributed.checkpoint's: the errors of all processes, with tracebacks
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # PyTorch's writers say of a full disk that a position is unexpected.
    full = folder.exists() and shutil.disk_usage(folder).free < _FULL_DISK
    return os.strerror(errno.ENOSPC) if full else one_line(error, limit=300)
