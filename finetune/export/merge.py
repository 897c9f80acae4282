"""Full weights for an export: the base model with the adapters merged, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file
from torch import Tensor

from finetune.base_model.announced_conditions import CONDITION_PREFIX
from finetune.base_model.locate import find_model_files
from finetune.base_model.weight_files import check_finite, count_parameters, read_header, read_tensors
from finetune.checkpoint.consolidated import merged_weight
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.layout import FULL_FILE, LORA_FILE, TTT_FILE
from finetune.checkpoint.reading import check_base, own_weights
from finetune.errors import CheckpointError
from finetune.wrapped_model import load_base

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_DEFAULT_DTYPE = "bfloat16"
_LORA_KEYS = ("lora_name", "lora_rank", "lora_scaling")


@dataclass(frozen=True)
class MergePlan:
    """What a merged export will hold.

    Attributes:
        checkpoint: whose adapters are merged, or whose base weights (full ones too) are copied.
        info: files of its base model.
        dtype: of the weights to write, `bfloat16` or `float32`.
        training: training.json of the export.
        parameters: number of parameters by weight file, that of TTT left out.
    """

    checkpoint: CheckpointDescription
    info: CheckpointInfo
    dtype: str
    training: dict[str, Any]
    parameters: dict[str, int]


def plan_merge(checkpoint: CheckpointDescription, training: Mapping[str, Any], *, dtype: str) -> MergePlan:
    """Find the base weights and see that they are those of training; nothing is loaded yet.

    Args:
        checkpoint: what to merge.
        training: its training.json, `moshi_paths` being those of the export.
        dtype: `auto` takes what training.json says, else bfloat16.

    Raises:
        CheckpointError: the base model is missing, or is not the one of training.
    """
    info = own_weights(checkpoint, find_model_files(checkpoint.model_paths))
    check_base(checkpoint, info)
    if dtype == "auto":
        recorded = training.get("param_dtype")
        dtype = recorded if recorded in list(DTYPES) else _DEFAULT_DTYPE
    parameters = {FULL_FILE: count_parameters(Path(info.moshi_weights))}
    return MergePlan(checkpoint, info, dtype, _merged_training(training, dtype=dtype), parameters)


def write_merged(plan: MergePlan, out: Path) -> None:
    """Write what `merged_tensors` returns, which it raises as.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    save_file(merged_tensors(plan), out)


def merged_tensors(plan: MergePlan) -> dict[str, Tensor]:
    """The base weights, `W + scaling * B A` where there is an adapter, by Moshi's names.

    The sum is computed in float32 and rounded once; conditioners stay float32, as Moshi keeps them. The base
    model stays in the dtype of its file and each tensor is replaced by its merged one, so that memory holds
    one model and one tensor.

    Raises:
        CheckpointError: the adapters do not fit the base model, or values are not finite.
    """
    folder, info = plan.checkpoint.folder, plan.info
    state = load_base(info, device="cpu", dtype=_stored_dtype(Path(info.moshi_weights))).state_dict()
    trained = _adapters(plan.checkpoint)
    with torch.no_grad():
        for name, tensor in state.items():
            value = _merged(name, tensor, trained, plan.checkpoint)
            if value.is_floating_point():
                check_finite({name: value}, source=str(folder))
                value = value.to(torch.float32 if name.startswith(CONDITION_PREFIX) else DTYPES[plan.dtype])
            state[name] = value.contiguous()
    if trained:
        raise CheckpointError(f"{folder}: {LORA_FILE}: {min(trained)} has no place in {info.moshi_weights}.")
    return state


def merged_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without adapters."""
    kept = {key: value for key, value in config.items() if key not in _LORA_KEYS}
    return kept | {"lora": False, "moshi_name": FULL_FILE}


def _merged_training(training: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """training.json with the files of a merged export, which needs no certain base weights any more."""
    files = [FULL_FILE, *([TTT_FILE] if TTT_FILE in training["files"] else [])]
    paths = dict(training["moshi_paths"]) | {"moshi_path": None}
    merged = {"merged_lora": LORA_FILE in training["files"]} if FULL_FILE not in training["files"] else {}
    changes = {"files": files, "moshi_paths": paths, "base_fingerprint": None, "param_dtype": dtype}
    return dict(training) | changes | merged


def _stored_dtype(path: Path) -> torch.dtype:
    dtypes = {h.dtype for name, h in read_header(path).items() if not name.startswith(CONDITION_PREFIX)}
    return torch.bfloat16 if dtypes <= {"BF16"} else torch.float32


def _adapters(checkpoint: CheckpointDescription) -> dict[str, Tensor]:
    """Tensors of the LoRA file, embeddings that trained beside the adapters included."""
    return read_tensors(checkpoint.folder / LORA_FILE) if LORA_FILE in checkpoint.files else {}


def _merged(
    name: str, tensor: Tensor, trained: dict[str, Tensor], checkpoint: CheckpointDescription
) -> Tensor:
    """What takes the place of a base tensor; takes its adapter out of `trained`."""
    layer = name.removesuffix("weight")
    up, down = trained.pop(f"{layer}lora_B.weight", None), trained.pop(f"{layer}lora_A.weight", None)
    replaced = trained.pop(name, trained.pop(f"{layer}frozen_W.weight", None))
    tensor = tensor if replaced is None else replaced
    if up is None or down is None:
        return tensor
    if (up.shape[0], down.shape[1]) != tensor.shape:
        raise CheckpointError(
            f"{checkpoint.folder}: {LORA_FILE}: {name} has an adapter for {[up.shape[0], down.shape[1]]}, "
            f"the base model has {list(tensor.shape)}."
        )
    assert checkpoint.lora is not None
    return merged_weight(tensor, up, down, scaling=checkpoint.lora.scaling)
