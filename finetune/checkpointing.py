"""Checkpoints that stock Moshi can read, with the TTT tensors in a file of their own beside them.

run_dir/checkpoints/checkpoint_000100/consolidated/
    lora.safetensors           LoRA adapters (and trained embeddings), or
    consolidated.safetensors   full weights (full fine-tuning, or adapters merged)
    ttt.safetensors            TTT weights and gates, when there are any
    config.json                as in a Moshi repository, with a `ttt` section when there is one
    training.json              the step, the files, the `ttt` section, where the base model came from
"""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.args import TrainArgs
from finetune.errors import CheckpointError
from finetune.ttt_utils import is_ttt_parameter

logger = logging.getLogger(__name__)

LORA_FILE = "lora.safetensors"
FULL_FILE = "consolidated.safetensors"
TTT_FILE = "ttt.safetensors"
CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"


class Checkpointer:
    """Writes checkpoints of one run; call from the main process only.

    Args:
        run_dir: the run directory.
        args: the configuration of the run.
        base_config: `config.json` of the base model.
        base_fingerprint: of its weights, so that adapters are not used on others; None: not known.
    """

    def __init__(
        self,
        run_dir: Path,
        args: TrainArgs,
        base_config: dict[str, Any],
        base_fingerprint: str | None = None,
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.args = args
        self.base_config = base_config
        self.base_fingerprint = base_fingerprint

    def save(self, model: LMModel, step: int) -> Path:
        """Write checkpoint_<step>, complete or not at all, then delete the oldest beyond num_ckpt_keep.

        Returns:
            Its directory.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full.
        """
        final = self.folder / f"checkpoint_{step:06d}"
        if final.exists():
            return final
        partial = self.folder / f".tmp-checkpoint_{step:06d}"
        content = partial / "consolidated"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            content.mkdir(parents=True)
            self._write(model, step, content)
            _sync(content)
            partial.rename(final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: the checkpoint cannot be written ({error}); earlier checkpoints are intact."
            ) from None
        logger.info("Saved %s", final)
        self._delete_old()
        return final

    def _write(self, model: LMModel, step: int, content: Path) -> None:
        files = split_weights(model, self.args)
        for name, tensors in files.items():
            save_file(tensors, content / name)
            _sync(content / name)
        _write_json(content / CONFIG_FILE, export_config(self.base_config, self.args, files))
        paths = {
            key: str(Path(value).resolve()) if value and Path(value).exists() else value
            for key, value in dataclasses.asdict(self.args.moshi_paths).items()
        }
        # The `ttt` section is here too: a baseline (ttt.layers: none) has windows, and no key in config.json.
        ttt = dataclasses.asdict(self.args.ttt)
        training = {
            "step": step,
            "files": sorted(files),
            "moshi_paths": paths,
            "base_fingerprint": self.base_fingerprint,
            "ttt": ttt,
        }
        _write_json(content / TRAINING_FILE, training)

    def _delete_old(self) -> None:
        keep = self.args.num_ckpt_keep
        if keep is not None:
            for old in list_checkpoints(self.folder)[:-keep]:
                shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a `checkpoints` folder, oldest first; other names and files are passed over."""
    found = [path for path in folder.glob("checkpoint_*") if path.is_dir() and _step_of(path) is not None]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int | None:
    digits = path.name.removeprefix("checkpoint_")
    return int(digits) if digits.isascii() and digits.isdigit() else None


def split_weights(model: LMModel, args: TrainArgs) -> dict[str, dict[str, Tensor]]:
    """The tensors to save, by file name.

    Adapters, TTT weights and gates keep their float32 masters; full weights take `args.param_dtype`.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    files = {TTT_FILE: {name: tensor for name, tensor in state.items() if is_ttt_parameter(name)}}
    base = {name: tensor for name, tensor in state.items() if not is_ttt_parameter(name)}
    if args.full_finetuning:
        files[FULL_FILE] = {name: _to_save(tensor, args) for name, tensor in base.items()}
    elif args.lora.enable and args.save_adapters:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        files[LORA_FILE] = {name: tensor for name, tensor in base.items() if name in trained}
    elif args.lora.enable:
        files[FULL_FILE] = _merged(model, base, args)
    return {
        file: {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        for file, tensors in files.items()
        if tensors
    }


def export_config(
    base_config: dict[str, Any], args: TrainArgs, files: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
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


def _merged(model: LMModel, base: dict[str, Tensor], args: TrainArgs) -> dict[str, Tensor]:
    merged = {
        name: _to_save(tensor, args)
        for name, tensor in base.items()
        if not any(part in ("lora_A", "lora_B", "frozen_W") for part in name.split("."))
    }
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            merged[f"{name}.weight"] = _to_save(module.merge_weight().detach(), args)
    return merged


def _to_save(tensor: Tensor, args: TrainArgs) -> Tensor:
    # Moved one by one: a second copy of a large model would not fit beside the first.
    dtype = getattr(torch, args.param_dtype) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype).cpu()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Make sure a file or directory is on disk before what refers to it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
