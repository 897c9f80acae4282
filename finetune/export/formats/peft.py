"""Our LoRA adapters as PEFT stores them, under Moshi's names or those of transformers.

PEFT adds `lora_alpha / r * B A` to a weight, so `lora_alpha` is our scaling times the rank.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.args import LoraArgs
from finetune.errors import CheckpointError
from finetune.export.formats.names import Part, Sizes, parts

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PeftModel's own modules
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING = re.compile(r"(depformer_)?(text_emb|emb\.\d+)\.weight")

Adapter = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and adapter_config.json


def adapter_of_moshi(tensors: Mapping[str, Tensor], lora: LoraArgs, *, base_model: str | None) -> Adapter:
    """An adapter for `moshi.models.lm.LMModel`.

    Args:
        tensors: of our LoRA file, embeddings that trained beside the adapters included.
        lora: rank and scaling.
        base_model: its Hub id; None where it is local.

    Returns:
        The tensors by PEFT's names, and adapter_config.json.

    Raises:
        CheckpointError: other weights than embeddings changed beside the adapters.
    """
    beside = sorted(name for name in tensors if ".lora_" not in name)
    for name in beside:
        if not _EMBEDDING.fullmatch(name):
            raise CheckpointError(
                f"{name} was changed beside the adapters, which PEFT has no place for; export with --merged, "
                "or with --format transformers."
            )
    modules = sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))
    saved = [name.removesuffix(".weight") for name in beside] or None
    config = _config(lora, modules, base_model=base_model) | {"modules_to_save": saved}
    return {_PREFIX + name: tensor for name, tensor in tensors.items()}, config


def adapter_of_transformers(tensors: Mapping[str, Tensor], lora: LoraArgs, sizes: Sizes) -> Adapter:
    """An adapter for transformers' `MoshiForConditionalGeneration`.

    The joint adapter of queries, keys and values becomes three, with the same `A` and their rows of `B`. In
    the depth transformer, whose weights are one tensor [dep_q, out, in], PEFT has one adapter for all
    codebooks: `A` is [dep_q * rank, in], codebook by codebook, and `B` [out, rank * dep_q], in which the
    codebook runs fastest.
    No base model is named: in the repository of a Moshi, transformers finds nothing that it could read.

    Args:
        tensors, lora: see `adapter_of_moshi`.
        sizes: of the model.

    Raises:
        CheckpointError: embeddings changed beside the adapters, whose names in transformers PEFT takes for
            those of others; or an adapter has no place there.
    """
    beside = [name for name in tensors if ".lora_" not in name]
    if beside:
        raise CheckpointError(
            f"{min(beside)} was changed beside the adapters, which PEFT could not tell apart by its name in "
            "transformers; export with --format transformers, which merges everything."
        )
    modules, parameters, left = [], [], dict.fromkeys(tensors)
    found: dict[str, Tensor] = {}
    for part in parts(sizes):
        names = [name + end for name in part.ours for end in (_A, _B)]
        if part.kind != "linear" or not all(name in tensors for name in names):
            continue
        down, up = _stacked(part, tensors) if part.is_stacked else _single(part, tensors)
        found |= {f"{_PREFIX}{part.theirs}{_A}": down, f"{_PREFIX}{part.theirs}{_B}": up}
        if part.is_stacked:
            parameters.append(f"{part.theirs}.weight")
        else:
            modules.append(part.theirs)
        for name in names:
            left.pop(name, None)
    if left:
        raise CheckpointError(f"{min(left)} has no place in the Moshi of transformers.")
    config = _config(lora, modules, base_model=None)
    return found, config | {"target_parameters": parameters or None}


def _single(part: Part, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    (name,) = part.ours
    # Several of transformers' matrices have the same A: a file of safetensors holds no tensor twice.
    return tensors[name + _A].clone(), part.rows(tensors[name + _B]).clone(
        memory_format=torch.contiguous_format
    )


def _stacked(part: Part, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    down = torch.cat([tensors[name + _A] for name in part.ours])
    up = torch.stack([part.rows(tensors[name + _B]) for name in part.ours], dim=-1)
    return down, up.flatten(1).contiguous()


def _config(lora: LoraArgs, modules: list[str], *, base_model: str | None) -> dict[str, Any]:
    alpha = lora.rank * lora.scaling
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
