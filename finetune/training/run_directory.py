"""The directory of a run: made fresh or gone on in, an older one renamed and never deleted."""

import json
import logging
from pathlib import Path

from finetune.args import TrainArgs
from finetune.checkpoint.layout import run_dir_of
from finetune.checkpoint.resume_check import ResumePoint, step_of_newest
from finetune.config_io import ARGS_FILE, dump_yaml
from finetune.distributed import is_main
from finetune.errors import ConfigError
from finetune.files import rename_to_backup
from finetune.monitoring.inner_loop_log import INNER_LOSSES_FILE
from finetune.monitoring.metrics_file import METRICS_FILE
from finetune.training.run_lock import LOCK_FILE, RunLock
from moshi_ttt.files.atomic_file import replacing

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
        if not _goes_on_in(path, args):
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


def lock_existing(args: TrainArgs, lock: RunLock) -> None:
    """Lock the run directory where there is one, in the main process, before anything in it is read.

    Raises:
        ConfigError: another run uses it, or it cannot be written.
    """
    path = Path(args.run_dir)
    if is_main() and _is_used(path):
        try:
            lock.take(path)
        except OSError as error:
            raise _cannot_be_written(path, error) from None


def make_run_dir(args: TrainArgs, lock: RunLock, point: ResumePoint | None = None) -> Path:
    """Create the run directory with `args.yaml` in it, or go on in it, in the main process.

    Records of steps after the one resumed from are moved to `<name>.abandoned.jsonl`.

    Args:
        args: the configuration.
        lock: of the run; it has the directory when this returns.
        point: where the run goes on, None for a new one.

    Raises:
        ConfigError: it cannot be written, or another run has made it meanwhile.
    """
    path = Path(args.run_dir)
    if not is_main():
        return path
    try:
        if point is not None and point.run_dir == path.resolve():
            lock.take(path)
            _go_on(path, args, point.step)
            return path
        if not _goes_on_in(path, args):
            _refuse_existing(path, args)
        if _is_used(path):
            lock.take(path)  # before it is renamed: somebody may have begun to use it meanwhile
            logger.info("Renamed the old %s to %s.", path, rename_to_backup(path))
        path.mkdir(parents=True, exist_ok=True)
        lock.take(path)
        (path / ARGS_FILE).write_text(dump_yaml(args), encoding="utf-8")
    except OSError as error:
        raise _cannot_be_written(path, error) from None
    return path


def _cannot_be_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"run_dir: {path} cannot be written: {error.strerror}.")


def _go_on(path: Path, args: TrainArgs, step: int) -> None:
    for name in (METRICS_FILE, INNER_LOSSES_FILE):
        _abandon_records(path / name, step)
    now, file = dump_yaml(args), path / ARGS_FILE
    if file.exists() and file.read_text(encoding="utf-8") != now:
        file.replace(path / f"args.until_step_{step}.yaml")
    file.write_text(now, encoding="utf-8")


def _abandon_records(path: Path, step: int) -> None:
    """Move the records of later steps, and a line that was cut off, to a file beside this one."""
    if not path.exists():
        return
    kept: list[str] = []
    abandoned: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        (kept if _is_until(line, step) else abandoned).append(line)
    if abandoned:
        with path.with_name(f"{path.stem}.abandoned{path.suffix}").open("a", encoding="utf-8") as file:
            file.writelines(abandoned)
        with replacing(path) as rest:
            rest.write_text("".join(kept), encoding="utf-8")


def _is_until(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _goes_on_in(path: Path, args: TrainArgs) -> bool:
    """Whether the configuration means to go on in an existing run directory."""
    if args.resume is None:
        return False
    return args.resume == "auto" or run_dir_of(args.resume).resolve() == path.resolve()


def _is_used(path: Path) -> bool:
    return path.is_dir() and any(entry.name != LOCK_FILE for entry in path.iterdir())


def _refuse_existing(path: Path, args: TrainArgs) -> None:
    if not _is_used(path) or args.overwrite_run_dir:
        return
    step = step_of_newest(path)
    go_on = "" if step is None else f"go on from its step {step} with --resume auto, "
    raise ConfigError(
        f"run_dir: {path} exists already; {go_on}choose another, or set overwrite_run_dir: true to rename it."
    )
