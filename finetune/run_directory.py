"""The directory of a run: made fresh, an older one renamed and never deleted."""

import logging
import time
from pathlib import Path

from finetune.args import TrainArgs
from finetune.config_io import dump_yaml
from finetune.distributed import barrier, is_main
from finetune.errors import ConfigError

logger = logging.getLogger(__name__)


def check_run_dir(args: TrainArgs) -> None:
    """Find out before anything slow whether the run directory can be used.

    Raises:
        ConfigError: it is not set, is a file, or exists and may not be renamed.
    """
    if not args.run_dir:
        raise ConfigError("run_dir: not set; give the folder that this run shall write.")
    path = Path(args.run_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir: {path} is a file; give the folder that this run shall write.")
    if path.is_dir() and any(path.iterdir()) and not args.overwrite_run_dir:
        raise ConfigError(
            f"run_dir: {path} exists already; choose another, or set overwrite_run_dir: true to rename it."
        )


def make_run_dir(args: TrainArgs) -> Path:
    """Create the run directory with `args.yaml` in it; call from all processes.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(args.run_dir)
    if is_main():
        try:
            if path.is_dir() and any(path.iterdir()):
                backup = path.with_name(f"{path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}")
                path.rename(backup)
                logger.info("Renamed the old %s to %s.", path, backup)
            path.mkdir(parents=True, exist_ok=True)
            (path / "args.yaml").write_text(dump_yaml(args), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run_dir: {path} cannot be written: {error.strerror}.") from None
    barrier()
    return path
