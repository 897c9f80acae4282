"""The one place that writes metrics (metrics.jsonl, TensorBoard, Weights & Biases) and reads them again."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from finetune.args import TrainArgs
from finetune.distributed import is_main
from finetune.errors import DataError, UserError
from finetune.files import finite_or_null, writing_to
from finetune.monitoring.wandb_run import WandbRun
from moshi_ttt.files.regular_file import regular_only

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes records of numbers; does nothing in processes other than the main one.

    Args:
        run_dir: `metrics.jsonl` and the TensorBoard folder `tb` go here.
        args: the configuration of the run, for W&B.
        first_step: of the records to come; a run that resumes hides TensorBoard's from there on.
        wandb_run_id: of the W&B run to go on with, None starts one.

    Raises:
        UserError: here and in all methods: a file cannot be written, for example because the disk is full.
    """

    def __init__(
        self, run_dir: Path, args: TrainArgs, *, first_step: int = 1, wandb_run_id: str | None = None
    ) -> None:
        self._active = is_main()
        self._wandb: WandbRun | None = None
        if not self._active:
            return
        self._path, self._folder = run_dir / METRICS_FILE, run_dir / "tb"
        with writing_to(self._path):
            self._file = open(self._path, "a", encoding="utf-8", opener=regular_only)  # noqa: SIM115
        self._hook = threading.excepthook
        threading.excepthook = _without_tensorboard(self._hook)
        with writing_to(self._folder):
            purge_step = first_step if first_step > 1 else None
            self._tensorboard = SummaryWriter(str(self._folder), purge_step=purge_step)
        if args.wandb.project is not None:
            self._wandb = WandbRun(run_dir, args, wandb_run_id)

    @property
    def wandb_run_id(self) -> str | None:
        """Of the W&B run, None without one and in other processes."""
        return None if self._wandb is None else self._wandb.id

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)
        try:
            with writing_to(self._path):
                self._file.close()
            with writing_to(self._folder):
                self._tensorboard.close()
        except UserError:
            if error is None:
                raise  # otherwise the run has said already why it ends
        finally:
            threading.excepthook = self._hook

    def write(self, split: str, step: int, values: dict[str, float]) -> None:
        """Write one record.

        Args:
            split: `train`, `eval` or `diagnostics`.
            step: optimiser steps done.
            values: finite or not, by metric name.
        """
        if not self._active:
            return
        record = {name: finite_or_null(value) for name, value in values.items()}
        with writing_to(self._path):
            self._file.write(json.dumps({"split": split, "step": step, **record}) + "\n")
            self._file.flush()
        with writing_to(self._folder):
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step)

    def write_audio(self, name: str, step: int, audio: Tensor, sample_rate: int, *, path: Path) -> None:
        """Write a sound, `[channels, samples]`, to TensorBoard (its first channel) and W&B.

        Args:
            name: of the series.
            step: optimiser steps done.
            audio: the samples.
            sample_rate: of them, in Hz.
            path: the wav file that they are in.
        """
        if not self._active:
            return
        with writing_to(self._folder):
            self._tensorboard.add_audio(name, audio[:1], step, sample_rate=sample_rate)
        if self._wandb is not None:
            self._wandb.log_audio(name, path, step)


def _without_tensorboard(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[..., None]:
    """A hook that shows no traceback of TensorBoard's own thread: its next caller gets the exception."""

    def show(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.thread, _AsyncWriterThread) and issubclass(args.exc_type, OSError)):
            hook(args)

    return show


class LogRecord(NamedTuple):
    """One record of one split."""

    step: int
    values: dict[str, float | None]  # None: not finite


def read_records(run_dir: Path, split: str) -> list[LogRecord]:
    """The records of one split in order; empty without a log, and a last line that was cut off is left out.

    Raises:
        DataError: the log cannot be read, or another line is damaged.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    records = []
    try:
        with open(path, encoding="utf-8", errors="replace", opener=regular_only) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                record = _parse(line, f"{path}: line {number}")
                if record.pop("split") == split:
                    records.append(LogRecord(record.pop("step"), record))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    return records


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
        split, step = record["split"], record["step"]
        numbers = all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            for name, value in record.items()
            if name != "split"
        )
        if not numbers or not isinstance(split, str) or not isinstance(step, int):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{where} is not a record of metrics; remove it to judge the rest.") from None
    return record
