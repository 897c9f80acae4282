"""The part of a checkpoint that is for use: weights that stock Moshi can read, TTT beside them."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from safetensors.torch import save_file
from torch import Tensor

from finetune.args import TrainArgs
from finetune.base_model.announced_conditions import CONDITION_PREFIX
from finetune.checkpoint.layout import (
    CONFIG_FILE,
    FIRST_CODEBOOK_KEY,
    FULL_FILE,
    LORA_FILE,
    TEXT_KEY,
    TRAINING_FILE,
    TTT_FILE,
)
from finetune.distributed import is_main
from finetune.files import sync_to_disk, write_json
from finetune.sharding import full_tensor
from finetune.ttt_utils import is_ttt_parameter

WeightFiles = dict[str, dict[str, Tensor]]  # tensors by name, by file name

_ADAPTERS = {"lora_A", "lora_B"}
_LORA_PARTS = _ADAPTERS | {"frozen_W"}


def gather_weights(model: LMModel, args: TrainArgs, *, frozen: Collection[str] = ()) -> WeightFiles:
    """The tensors to save, copied to the host, by file name; every process must call it.

    Adapters, TTT weights and gates keep their float32 masters; full weights take `args.param_dtype`, but
    those of conditioners stay float32, as Moshi keeps them.

    Args:
        model: in training.
        args: of the run.
        frozen: parameters that do not train and are not those of the base model, see
            `finetune.checkpoint.reading.warm_start`.

    Returns:
        Empty in processes other than the main one.
    """
    own = {
        name
        for name, parameter in model.named_parameters()
        # Adapters that no loss reaches are saved too: who loads them expects one of every linear layer.
        if parameter.requires_grad or name in frozen or not _ADAPTERS.isdisjoint(name.split("."))
    }
    merged = args.lora.enable and not args.save_adapters
    files: WeightFiles = {}
    for name, tensor in model.state_dict().items():
        if is_ttt_parameter(name):
            _add(files, TTT_FILE, name, full_tensor(tensor.detach()))
        elif args.full_finetuning or (merged and _LORA_PARTS.isdisjoint(name.split("."))):
            _add(files, FULL_FILE, name, _rounded(name, full_tensor(tensor.detach()), args))
        elif not merged and name in own:
            _add(files, LORA_FILE, name, full_tensor(tensor.detach()))
    if merged:
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                _add(files, FULL_FILE, f"{name}.weight", _rounded(name, _merged(module), args))
    return files


def write_consolidated(
    folder: Path,
    files: WeightFiles,
    args: TrainArgs,
    *,
    step: int,
    base_config: dict[str, Any],
    base_fingerprint: str | None,
) -> None:
    """Write weights, `config.json` and `training.json` into an existing folder.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    for name, tensors in files.items():
        save_file(tensors, folder / name)
        sync_to_disk(folder / name)
    write_json(folder / CONFIG_FILE, export_config(base_config, args, files))
    paths = {
        key: str(Path(value).resolve()) if value and key != "revision" and Path(value).exists() else value
        for key, value in dataclasses.asdict(args.moshi_paths).items()
    }
    training = {
        "step": step,
        "files": sorted(files),
        "moshi_paths": paths,
        "base_fingerprint": base_fingerprint,
        "param_dtype": args.param_dtype,
        # Scores of speech weigh the codebooks as training did.
        FIRST_CODEBOOK_KEY: args.first_codebook_weight_multiplier,
        TEXT_KEY: dataclasses.asdict(args.text_options),
        # Here too: a baseline (ttt.layers: none) has windows, and no such key in config.json.
        "ttt": dataclasses.asdict(args.ttt),
    }
    write_json(folder / TRAINING_FILE, training)
    sync_to_disk(folder)


def export_config(base_config: dict[str, Any], args: TrainArgs, files: WeightFiles) -> dict[str, Any]:
    """`config.json`: the base model's, the adapters' shape, and the `ttt` section when there is TTT.

    Stock Moshi raises on keys it does not know, so without TTT there is no such key.
    """
    config = {key: value for key, value in base_config.items() if key != "lora_name"}
    config["lora"] = LORA_FILE in files
    if LORA_FILE in files:
        config |= {"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling}
    if FULL_FILE in files:
        config["moshi_name"] = FULL_FILE
    if TTT_FILE in files:
        config["ttt"] = dataclasses.asdict(args.ttt)
    return config


def merged_weight(weight: Tensor, up: Tensor, down: Tensor, *, scaling: float) -> Tensor:
    """`W + scaling * B A` in float32, which stock Moshi computes in the same order.

    Args:
        weight: `W`, of the base model.
        up: `B` of the adapter.
        down: `A` of the adapter.
        scaling: of the adapter.
    """
    # In place: of a large layer, one product lies beside the weight and not three.
    return up.float().mm(down.float()).mul_(scaling).add_(weight)


def _add(files: WeightFiles, file: str, name: str, tensor: Tensor) -> None:
    # Moved one by one: a second copy of a large model would not fit beside the first.
    if is_main():
        files.setdefault(file, {})[name] = tensor.to("cpu", copy=True).contiguous()


def _rounded(name: str, tensor: Tensor, args: TrainArgs) -> Tensor:
    if name.startswith(CONDITION_PREFIX) or not tensor.is_floating_point():
        return tensor
    return tensor.to(getattr(torch, args.param_dtype))


def _merged(module: LoRALinear) -> Tensor:
    parts = (module.frozen_W, module.lora_B, module.lora_A)
    weight, up, down = (full_tensor(part.weight.detach()) for part in parts)
    return merged_weight(weight, up, down, scaling=module.scaling)
