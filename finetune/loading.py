"""Reading our checkpoints: as the start of another run, and as a model to use."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_lora_with_linear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.args import LoraArgs, ModelPaths, TTTArgs
from finetune.checkpointing import (
    CONFIG_FILE,
    FULL_FILE,
    LORA_FILE,
    TRAINING_FILE,
    TTT_FILE,
    list_checkpoints,
)
from finetune.config_io import build_args
from finetune.errors import CheckpointError, ConfigError
from finetune.repository import find_model_files
from finetune.ttt_integration import apply_ttt_to_model
from finetune.ttt_utils import is_ttt_parameter
from finetune.wrapped_model import add_lora

logger = logging.getLogger(__name__)


def find_checkpoint(path: str | Path) -> Path:
    """The folder with the weights, of a run directory (its newest checkpoint), a checkpoint or itself.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    candidates = [path, path / "consolidated"]
    if (path / "checkpoints").is_dir():
        candidates += [folder / "consolidated" for folder in list_checkpoints(path / "checkpoints")[-1:]]
    for candidate in candidates:
        if (candidate / CONFIG_FILE).is_file() and (candidate / TRAINING_FILE).is_file():
            return candidate
    raise CheckpointError(f"{path}: no checkpoint here; give a run directory or one of its checkpoints.")


def warm_start(model: LMModel, path: str | Path) -> str:
    """Copy a checkpoint's adapters, TTT weights and gates (or full weights) into a model that will train.

    Returns:
        One line that says what was loaded.

    Raises:
        CheckpointError: a tensor of the checkpoint has no place in the model, TTT tensors that the model
            has are missing, or a shape differs. The model is unchanged then.
    """
    folder = find_checkpoint(path)
    tensors = _read_files(folder, (FULL_FILE, LORA_FILE, TTT_FILE))
    if not tensors:
        raise CheckpointError(f"init_from: {folder} holds no weights.")
    counts = load_exactly(model, tensors, source=f"init_from: {folder}")
    return f"Warm start from {folder}: {counts['base']} base or LoRA tensors, {counts['ttt']} TTT tensors."


def load_exactly(model: LMModel, tensors: dict[str, Tensor], *, source: str) -> dict[str, int]:
    """Copy tensors into the parameters of the same names, all or nothing.

    Returns:
        How many tensors of the base (LoRA included) and of TTT were copied.

    Raises:
        CheckpointError: see `warm_start`; the line starts with source.
    """
    state = model.state_dict()
    unknown = sorted(set(tensors) - set(state))
    if unknown:
        hint = " (is lora.enable, or are ttt.layers, different?)" if _is_added(unknown[0]) else ""
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no place in this model, for example {unknown[0]}{hint}."
        )
    missing = sorted(name for name in state if is_ttt_parameter(name) and name not in tensors)
    if missing:
        raise CheckpointError(
            f"{source}: {len(missing)} TTT tensors are missing, for example {missing[0]}; "
            "ttt.layers must be those of the checkpoint."
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensor.shape)}, expected {list(state[name].shape)}."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    num_ttt = sum(is_ttt_parameter(name) for name in tensors)
    return {"base": len(tensors) - num_ttt, "ttt": num_ttt}


def load_checkpoint_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse_lora: bool = False,
) -> LMModel:
    """Rebuild the trained model from a run directory or checkpoint, in evaluation mode.

    The base model comes from where training found it, unless the checkpoint holds full weights.

    Args:
        path: run directory (its newest checkpoint) or checkpoint.
        device, dtype: of the model.
        fuse_lora: merge the adapters into the base weights.

    Raises:
        CheckpointError: files are missing, corrupt or do not fit the base model.
    """
    folder = find_checkpoint(path)
    config, training = read_json(folder / CONFIG_FILE), read_json(folder / TRAINING_FILE)
    paths = dict(training["moshi_paths"])
    if (folder / FULL_FILE).is_file():
        paths["moshi_path"] = str(folder / FULL_FILE)
    try:
        info = find_model_files(build_args(ModelPaths, paths))
        ttt_args = build_args(TTTArgs, config.get("ttt", {}), "ttt.")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    model = info.get_moshi(device=device, dtype=dtype, lm_kwargs_overrides={"lora": False}, fuse_lora=True)
    if config.get("lora"):
        add_lora(model, LoraArgs(enable=True, rank=config["lora_rank"], scaling=config["lora_scaling"]))
    apply_ttt_to_model(model, ttt_args)
    tensors = _read_files(folder, (LORA_FILE, TTT_FILE))
    counts = load_exactly(model, tensors, source=str(folder))
    logger.info("Loaded %s: %d adapter tensors, %d TTT tensors.", folder, counts["base"], counts["ttt"])
    if fuse_lora:
        replace_lora_with_linear(model)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is corrupt.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return value


def _read_files(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        if (folder / name).is_file():
            tensors |= read_tensors(folder / name)
    return tensors


def _is_added(name: str) -> bool:
    return is_ttt_parameter(name) or ".lora_" in name
