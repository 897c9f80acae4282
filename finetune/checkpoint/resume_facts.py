"""What `resume.json` must say, looked at before a run goes on from it."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from finetune.base_model.config_values import StrictValues, check_values
from finetune.checkpoint.layout import RESUME_FILE, step_of
from finetune.errors import CheckpointError
from finetune.files import read_json_object

_Whole = Annotated[int, Field(ge=0, le=2**62)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Evaluation(StrictValues):
    step: _Whole
    loss: _Number


class _Data(StrictValues):
    num_recordings: _Whole


class _Paths(StrictValues):
    moshi_path: str | None


class _Args(StrictValues):
    moshi_paths: _Paths


class _Facts(StrictValues):
    step: _Whole
    num_samples: _Whole
    best_eval: _Evaluation | None
    # Recording and next frame by lane.
    memory: dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
        Annotated[list[_Whole], Field(min_length=2, max_length=2)],
    ]
    args: _Args
    global_batch: _Whole
    data: _Data
    eval_data: _Data | None = None
    base_fingerprint: str
    wandb_run_id: str | None
    frozen: list[str] = Field(default_factory=list)


def read_resume_facts(folder: Path) -> dict[str, Any]:
    """The `resume.json` of a checkpoint.

    Raises:
        CheckpointError: a key is missing or has a value that cannot be; names both.
    """
    path = folder / RESUME_FILE
    facts = read_json_object(path)
    check_values(_Facts, facts, source=str(path))
    _check_sections(facts["args"], path)
    if facts["step"] != step_of(folder):
        raise CheckpointError(f"{path}: step: {facts['step']} is not that of its folder.")
    return facts


def _check_sections(args: Mapping[str, Any], path: Path) -> None:
    """The sections of a configuration are sections, so that they can be compared key by key."""
    for key in ("ttt", "lora", "data", "optim"):
        if not isinstance(args.get(key), dict):
            raise CheckpointError(
                f"{path}: args.{key}: {reprlib.repr(args.get(key))} is not a section of keys."
            )
