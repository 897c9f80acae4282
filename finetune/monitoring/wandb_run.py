"""A run's page at Weights & Biases: a side channel, which never ends a training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.args import TrainArgs
from finetune.config_io import public_values
from finetune.errors import ConfigError, one_line

logger = logging.getLogger(__name__)


class WandbRun:
    """Where numbers and sounds go; after the first failure nothing goes there any more.

    Args:
        run_dir: of the run.
        args: its configuration.
        run_id: of the W&B run to go on with, None starts one.

    Attributes:
        id: of the W&B run; of one that could not be gone on with, what it was. None without one.
    """

    def __init__(self, run_dir: Path, args: TrainArgs, run_id: str | None) -> None:
        self.id = run_id
        self._run: Run | None = None
        with self._failing_quietly():
            self._run = _start(run_dir, args, run_id)
            self.id = str(self._run.id)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name."""
        with self._failing_quietly():
            if self._run is not None:
                self._run.log(values, step=step)

    def log_audio(self, name: str, path: Path, step: int) -> None:
        """Log a sound, a wav file."""
        with self._failing_quietly():
            if self._run is not None:
                import wandb

                # From its samples wandb would make a wav file by a package that it does not bring.
                self._run.log({name: wandb.Audio(str(path))}, step=step)

    def finish(self, exit_code: int) -> None:
        """Upload what is left."""
        with self._failing_quietly():
            if self._run is not None:
                self._run.finish(exit_code=exit_code)

    @contextmanager
    def _failing_quietly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service and its client may come to
            self._run = None
            reason = one_line(f"{type(error).__name__}: {error}", limit=300)
            logger.warning("W&B has failed (%s). Training goes on without it; metrics.jsonl has all.", reason)


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


def _start(run_dir: Path, args: TrainArgs, run_id: str | None) -> "Run":
    import wandb

    if args.wandb.key is not None:
        wandb.login(key=args.wandb.key)
    if args.wandb.offline:
        logger.info("W&B writes offline; upload with: wandb sync %s", run_dir / "wandb" / "offline-run-*")
    settings: dict[str, Any] = {
        "project": args.wandb.project,
        "name": args.wandb.run_name or run_dir.name,
        "dir": str(run_dir),
        "id": run_id,
        "resume": None if run_id is None else "allow",
        "mode": "offline" if args.wandb.offline else "online",
        "config": public_values(args),
    }
    return wandb.init(**settings)


if TYPE_CHECKING:
    from wandb import Run
