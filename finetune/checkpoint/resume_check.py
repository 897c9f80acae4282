"""Where a run goes on: the newest checkpoint that is intact, and whether the configuration still fits it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi.models.loaders import CheckpointInfo

from finetune.args import DiagnosticsArgs, TrainArgs
from finetune.base_model.fingerprint import is_same_base
from finetune.checkpoint.data_check import check_data, check_eval_data
from finetune.checkpoint.integrity import find_damage, listed_files
from finetune.checkpoint.layout import DONE_FILE, RESUME_FILE, STATE_DIR, list_checkpoints, step_of
from finetune.checkpoint.resume_facts import read_resume_facts
from finetune.config_io import all_keys, as_recorded, public_values, yaml_text
from finetune.distributed import barrier, gather_objects, get_rank, get_world_size, is_main
from finetune.errors import CheckpointError, ConfigError
from finetune.evaluation.args import SpokenArgs
from finetune.files import rename_to_backup
from moshi_ttt.config import TTTOptions

logger = logging.getLogger(__name__)

# Keys whose change makes going on meaningless: other parameters, or another order of the data.
_FIXED = {
    "full_finetuning",
    "lora.enable",
    "lora.rank",
    "lora.scaling",
    "lora.ft_embed",
    "ttt.enable",
    "ttt.layers",
    "ttt.persistent_states",
    "duration_sec",
    "seed",
    "data.shuffle",
    *(f"ttt.{name}" for name in TTTOptions.__dataclass_fields__),
}
FROZEN_FACT = "frozen"  # in resume.json
# Keys that say nothing about the training.
_IRRELEVANT = {
    "run_dir",
    "overwrite_run_dir",
    "resume",
    "init_from",
    "device",
    "data.num_workers",
    "wandb.key",
    *(f"eval.spoken.{name}" for name in SpokenArgs.__dataclass_fields__),
    *(f"diagnostics.{name}" for name in DiagnosticsArgs.__dataclass_fields__),
}


@dataclass(frozen=True)
class ResumePoint:
    """An intact checkpoint with a training state.

    Attributes:
        folder: of the checkpoint.
        step: optimiser steps done.
        facts: its `resume.json`.
        run_dir: of the run that wrote it.
    """

    folder: Path
    step: int
    facts: Mapping[str, Any]
    run_dir: Path

    @property
    def state_dir(self) -> Path:
        """Folder of the tensors."""
        return self.folder / STATE_DIR

    @property
    def frozen(self) -> list[str]:
        """Parameters that do not train and are not those of the base model; earlier versions kept none."""
        return self.facts.get(FROZEN_FACT, [])


def find_resume_point(args: TrainArgs) -> ResumePoint | None:
    """The checkpoint that `args.resume` means; every process must call it.

    A checkpoint that is damaged is reported, and the one before it is used.

    Returns:
        None with `auto` where the run directory has no checkpoint yet.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    if args.resume is None:
        return None
    path = Path(args.run_dir if args.resume == "auto" else args.resume)
    folders = _candidates(path)
    if not folders:
        if args.resume == "auto":
            return None
        raise CheckpointError(f"resume: {path} has no checkpoint; give a run directory or a checkpoint.")
    for folder in reversed(folders):
        problem = _find_problem(folder)
        if problem is None:
            try:  # alike in every process
                facts = read_resume_facts(folder)
                return ResumePoint(folder, facts["step"], facts, folder.resolve().parent.parent)
            except CheckpointError as error:
                problem = str(error)
        logger.warning("%s cannot be used: %s.", folder, problem)
    raise CheckpointError(
        f"resume: no checkpoint of {path} is intact ({problem} in the last one tried); "
        "nothing was changed, use another run_dir to start afresh."
    )


def step_of_newest(run_dir: Path) -> int | None:
    """The step of the newest checkpoint of a run directory, unverified; None without any."""
    found = list_checkpoints(run_dir / "checkpoints")
    return step_of(found[-1]) if found else None


def check_configuration(
    point: ResumePoint,
    args: TrainArgs,
    *,
    data: Mapping[str, Any],
    eval_data: Mapping[str, Any] | None,
    recordings: Sequence[Path],
    info: CheckpointInfo,
) -> list[str]:
    """Compare configuration, data and base model with those of the checkpoint.

    Args:
        point: where to go on.
        args: the configuration now.
        data, eval_data: facts about the training and evaluation data now, as in `resume.json`.
        recordings: the audio files of the training data now.
        info: files of the base model now.

    Returns:
        A line for each key that has changed, and for codes and evaluation data that have.

    Raises:
        ConfigError: going on would be meaningless.
    """
    before, now = _flat(as_recorded(point.facts["args"])), _flat(public_values(args))
    _check_younger_keys(point, args, before=before, now=now)
    before = _defaults() | before  # of keys that the run did not know yet
    lines = []
    for key in sorted(now.keys() | before.keys()):
        old, new = before.get(key), now.get(key)
        if key in _IRRELEVANT or old == new or (key.startswith("ttt.") and not args.ttt.enable):
            continue
        if key in _FIXED:
            raise ConfigError(
                f"{key}: is {yaml_text(new)}, but the run to resume ({point.folder}) has {yaml_text(old)}; "
                "change it back, or start a new run with init_from."
            )
        lines.append(f"Changed since step {point.step}: {key} {yaml_text(old)} -> {yaml_text(new)}")
    if not is_same_base(info, point.facts["base_fingerprint"]):
        raise ConfigError(
            f"moshi_paths: holds other weights than when {point.folder} was written; "
            "give the same base model, or start a new run with init_from."
        )
    lines += check_data(point.facts["data"], data, recordings=recordings, written=point.folder)
    lines += check_eval_data(point.facts.get("eval_data"), eval_data, written=point.folder)
    return lines + _batch_lines(point, args)


def set_aside_newer(point: ResumePoint) -> None:
    """Rename checkpoints that are newer than the one resumed from: they are damaged, or of another course."""
    if is_main():
        for folder in list_checkpoints(point.folder.parent):
            step = step_of(folder)
            if step is not None and step > point.step:
                logger.info("Renamed %s to %s.", folder, rename_to_backup(folder))
    barrier()


def global_batch(args: TrainArgs) -> int:
    """Chunks of one optimiser step, over all processes and micro-batches."""
    return args.batch_size * args.num_microbatches * get_world_size()


def _candidates(path: Path) -> list[Path]:
    """Checkpoint folders of a path, oldest first."""
    if step_of(path) is not None:
        return [path] if path.is_dir() else []
    return list_checkpoints(path / "checkpoints")


def _find_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; every process reads its share of the files."""
    try:
        if not (folder / RESUME_FILE).is_file() or not (folder / STATE_DIR).is_dir():
            return "it has no training state, only weights (use init_from)"
        listed = listed_files(folder)
        names = sorted(listed)[get_rank() :: get_world_size()]
        problem = find_damage(folder, names, listed)
        if problem is None and RESUME_FILE not in listed:
            problem = f"{DONE_FILE} does not list {RESUME_FILE}"
    except CheckpointError as error:
        problem = str(error)
    return next((text for text in gather_objects(problem) if text is not None), None)


def _check_younger_keys(
    point: ResumePoint, args: TrainArgs, *, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Of keys that the run to resume did not know yet, name all at once: a configuration must have them."""
    known = _flat(point.facts["args"])
    changed = {
        key: before[key]
        for key in sorted(before.keys() - known.keys())
        if args.ttt.enable and before[key] != now[key]
    }
    if changed:
        there = ", ".join(f"{key}: {yaml_text(value)}" for key, value in changed.items())
        raise ConfigError(
            f"{', '.join(changed)}: the run to resume ({point.folder}) is older than these keys and means "
            f"{there}; give these values, or start a new run with init_from."
        )


def _batch_lines(point: ResumePoint, args: TrainArgs) -> list[str]:
    old, new = point.facts["global_batch"], global_batch(args)
    if old == new:
        return []
    hint = "the product of processes, batch_size and num_microbatches"
    if args.carries_memory:
        raise ConfigError(
            f"batch_size: a step has {new} chunks ({hint}), the run to resume has {old}, and its memories "
            "belong to these; choose batch_size and num_microbatches so that it is the same."
        )
    return [f"Changed since step {point.step}: chunks of a step ({hint}) {old} -> {new}"]


def _defaults() -> dict[str, Any]:
    return _flat({key: info.get_default(call_default_factory=True) for key, info in all_keys()})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
