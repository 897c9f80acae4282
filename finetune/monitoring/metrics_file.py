"""The one place that writes metrics (metrics.jsonl, TensorBoard, Weights & Biases) and reads them again."""

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from finetune.args import TrainArgs
from finetune.config_io import public_values
from finetune.distributed import is_main
from finetune.errors import ConfigError, DataError
from finetune.files import finite_or_null

logger = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes records of numbers; does nothing in processes other than the main one.

    Args:
        run_dir: `metrics.jsonl` and the TensorBoard folder `tb` go here.
        args: the configuration of the run, for W&B.
        first_step: of the records to come; a run that resumes hides TensorBoard's from there on.
        wandb_run_id: of the W&B run to go on with, None starts one.
    """

    def __init__(
        self, run_dir: Path, args: TrainArgs, *, first_step: int = 1, wandb_run_id: str | None = None
    ) -> None:
        self._active = is_main()
        self._wandb: Run | None = None
        if not self._active:
            return
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        purge_step = first_step if first_step > 1 else None
        self._tensorboard = SummaryWriter(str(run_dir / "tb"), purge_step=purge_step)
        if args.wandb.project is not None:
            self._wandb = _start_wandb(run_dir, args, wandb_run_id)

    @property
    def wandb_run_id(self) -> str | None:
        """Of the W&B run, None without one and in other processes."""
        return None if self._wandb is None else str(self._wandb.id)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

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
        self._file.write(json.dumps({"split": split, "step": step, **record}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def write_audio(self, name: str, step: int, audio: Tensor, sample_rate: int) -> None:
        """Write a sound, `[channels, samples]`, to TensorBoard (its first channel) and W&B."""
        if not self._active:
            return
        self._tensorboard.add_audio(name, audio[:1], step, sample_rate=sample_rate)
        if self._wandb is not None:
            import wandb

            sound = wandb.Audio(audio.T.numpy(), sample_rate=sample_rate)
            self._wandb.log({name: sound}, step=step)


def check_wandb(args: TrainArgs) -> None:
    """Find out before a run starts whether W&B is there when it is configured.

    Raises:
        ConfigError: it is not.
    """
    if args.wandb.project is None:
        return
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise ConfigError(
            "wandb.project: wandb is not installed: pip install 'moshi-ttt[wandb]', or set it to null."
        ) from None


def _start_wandb(run_dir: Path, args: TrainArgs, run_id: str | None) -> "Run":
    import wandb

    if args.wandb.key is not None:
        wandb.login(key=args.wandb.key)
    if args.wandb.offline:
        logger.info("W&B writes offline; upload with: wandb sync %s", run_dir / "wandb" / "offline-run-*")
    return wandb.init(
        project=args.wandb.project,
        name=args.wandb.run_name or run_dir.name,
        dir=str(run_dir),
        id=run_id,
        resume=None if run_id is None else "allow",
        mode="offline" if args.wandb.offline else "online",
        config=public_values(args),
    )


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
        with path.open(encoding="utf-8", errors="replace") as file:
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


if TYPE_CHECKING:
    from wandb import Run
