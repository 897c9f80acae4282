"""The directory of a run: made fresh, an older one renamed and never deleted."""

import logging
from pathlib import Path

from finetune.args import TrainArgs
from finetune.config_io import dump_yaml
from finetune.distributed import is_main
from finetune.errors import ConfigError
from finetune.files import rename_to_backup

logger = logging.getLogger(__name__)


def check_run_dir(args: TrainArgs) -> None:
    """Find out before anything slow whether the run directory can be used.

    Raises:
        ConfigError: it is not set, is a file, exists and may not be renamed, or holds what the run reads.
    """
    if not args.run_dir:
        raise ConfigError("run_dir: not set; give the folder that this run shall write.")
    path = Path(args.run_dir)
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir: {path} is a file; give the folder that this run shall write.")
        _refuse_existing(path, args)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run_dir: {args.run_dir[:80]!r} is not a usable path: {error}.") from None
    inputs = {
        "the current directory": ".",
        "data.train_data": args.data.train_data,
        "data.eval_data": args.data.eval_data,
        "moshi_paths.hf_repo_id": args.moshi_paths.hf_repo_id,
        "data.cache_dir": args.data.cache_dir,
    }
    for key, value in inputs.items():
        if value and Path(value).exists() and Path(value).resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"run_dir: {path} contains {key} ({value}); give a folder of its own.")


def make_run_dir(args: TrainArgs) -> Path:
    """Create the run directory with `args.yaml` in it, in the main process.

    Raises:
        ConfigError: it cannot be written, or another run has made it meanwhile.
    """
    path = Path(args.run_dir)
    if is_main():
        try:
            _refuse_existing(path, args)
            if _is_used(path):
                logger.info("Renamed the old %s to %s.", path, rename_to_backup(path))
            path.mkdir(parents=True, exist_ok=True)
            (path / "args.yaml").write_text(dump_yaml(args), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run_dir: {path} cannot be written: {error.strerror}.") from None
    return path


def _is_used(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _refuse_existing(path: Path, args: TrainArgs) -> None:
    if _is_used(path) and not args.overwrite_run_dir:
        raise ConfigError(
            f"run_dir: {path} exists already; choose another, or set overwrite_run_dir: true to rename it."
        )
