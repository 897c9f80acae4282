"""What the descriptions of a model may say when a stranger wrote them: file names, values, kinds.

Nothing is ever unpickled, so weights are safetensors files, which Moshi's own loader does not insist on, and
a name stays inside its folder. What a checkpoint
announces is held against its weights in `finetune.checkpoint.description`.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from finetune.base_model.config_values import check_model_values
from finetune.base_model.model_kinds import check_model_kind
from finetune.errors import CheckpointError

WEIGHT_SUFFIX = ".safetensors"

_WEIGHT_KEYS = ("moshi_name", "mimi_name", "lora_name")
_OTHER_FILE_KEYS = ("tokenizer_name", "mimi_config_name")


def check_weight_file(value: object, *, key: str) -> None:
    """Refuse weights in a format that is read by unpickling, which runs code that the file brings along.

    Args:
        value: path, or address `hf://…`, of the weights.
        key: where it stands, the start of the line.

    Raises:
        CheckpointError: it is no safetensors file by its name.
    """
    if not str(value).endswith(WEIGHT_SUFFIX):
        raise CheckpointError(
            f"{key}: {str(value)!r} is not a {WEIGHT_SUFFIX} file, and nothing else is read because other "
            "formats can run code; convert it with safetensors.torch.save_file."
        )


def check_config_values(config: Mapping[str, Any], *, source: str) -> None:
    """Look at the values of a `config.json` before anything is read or built from it.

    Args:
        config: its values.
        source: its path, or the repository.

    Raises:
        CheckpointError: a name leaves the folder or names weights that would be unpickled, a value is of
            another type or beyond all reason, or the model is of a kind that cannot be used.
    """
    for key in (*_WEIGHT_KEYS, *_OTHER_FILE_KEYS):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not _stays_inside(value):
            raise CheckpointError(f"{source}: {key}: {value!r} is not the name of a file in the same folder.")
        if key in _WEIGHT_KEYS:
            check_weight_file(value, key=f"{source}: {key}")
    check_model_values(config, source=source)
    check_model_kind(config, source=source)


def _stays_inside(name: str) -> bool:
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return name != "" and "://" not in name and not any(p.anchor or ".." in p.parts for p in paths)
