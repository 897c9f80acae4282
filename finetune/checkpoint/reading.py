"""Reading our checkpoints: as the start of another run, and as a model to use."""

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import replace_lora_with_linear
from torch import Tensor

from finetune.args import LoraArgs, ModelPaths, TrainArgs, TTTArgs
from finetune.base_model.locate import (
    base_fingerprint,
    download_checkpoint,
    find_model_files,
    is_hub_id,
    is_local_name,
)
from finetune.base_model.untrusted import check_config_values
from finetune.base_model.weight_files import (
    check_finite,
    check_headers,
    header_of,
    name_in,
    read_files,
    read_headers,
)
from finetune.checkpoint.announced import check_announced, check_sections
from finetune.checkpoint.layout import (
    CONFIG_FILE,
    FIRST_CODEBOOK_KEY,
    FULL_FILE,
    LORA_FILE,
    TRAINING_FILE,
    TTT_FILE,
    WEIGHT_FILES,
    list_checkpoints,
)
from finetune.config_io import build_args
from finetune.errors import CheckpointError, ConfigError
from finetune.files import read_json_object
from finetune.ttt_integration import apply_ttt_to_model, keep_ttt_precision
from finetune.ttt_utils import is_ttt_parameter
from finetune.wrapped_model import add_lora, load_base
from moshi_ttt.config import TTTOptions

logger = logging.getLogger(__name__)


def find_checkpoint(path: str | Path) -> Path:
    """The folder with the weights, of a run directory (its newest checkpoint), a checkpoint or itself.

    Checkpoints of moshi-finetune are found as well: a folder with config.json and weights. So is a
    repository `user/name` of the Hugging Face Hub, which is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if not Path(path).exists() and is_hub_id(str(path)) and not is_local_name(path):
        path = download_checkpoint(str(path))
    path = Path(path)
    candidates = [path, path / "consolidated"]
    if (path / "checkpoints").is_dir():
        newest_first = reversed(list_checkpoints(path / "checkpoints"))
        candidates += [folder / "consolidated" for folder in newest_first]
    for candidate in candidates:
        has_weights = any((candidate / name).is_file() for name in WEIGHT_FILES)
        if (candidate / CONFIG_FILE).is_file() and has_weights:
            return candidate
    what = "no checkpoint here"
    if not path.exists():
        what = "does not exist" if path.is_absolute() else f"does not exist in {Path.cwd()}"
    raise CheckpointError(f"{path}: {what}; give a run directory or one of its checkpoints.")


def warm_start(model: LMModel, path: str | Path, args: TrainArgs) -> list[str]:
    """Copy a checkpoint's adapters, TTT weights and gates (or full weights) into a model that will train.

    What the checkpoint does not have (TTT after a run with LoRA only, say) starts fresh.

    Returns:
        Lines that say what was loaded, what starts fresh, and which settings differ from the checkpoint's.

    Raises:
        CheckpointError: a tensor of the checkpoint has no place in the model, one that its configuration
            announces is missing, or a shape differs. The model is unchanged.
    """
    folder = find_checkpoint(path)
    config = _read_descriptions(folder)
    announced = [kind for kind in ("lora", "ttt") if config.get(kind)]
    source = f"init_from: {folder}"
    check_headers(read_headers(folder, WEIGHT_FILES), _shapes(model), complete=announced, source=source)
    tensors = read_files(folder, WEIGHT_FILES)
    counts = load_exactly(model, tensors, complete=announced, source=source)
    lines = [f"Warm start from {folder}: {counts['base']} base or LoRA tensors, {counts['ttt']} TTT tensors."]
    if args.ttt.enable and not counts["ttt"]:
        lines.append("The checkpoint has no TTT: the TTT layers and gates start fresh.")
    if args.lora.enable and config.get("lora") and config["lora_scaling"] != args.lora.scaling:
        lines.append(
            f"Differs: lora.scaling is {args.lora.scaling}, the checkpoint had {config['lora_scaling']}."
        )
    for key in config.get("ttt", {}).keys() & (TTTOptions.__dataclass_fields__.keys() | {"base_lr"}):
        ours, theirs = getattr(args.ttt, key), config["ttt"][key]
        if ours != theirs:
            lines.append(f"Differs: ttt.{key} is {ours}, the checkpoint had {theirs}.")
    return lines


def load_exactly(
    model: LMModel, tensors: dict[str, Tensor], *, complete: Collection[str], source: str
) -> dict[str, int]:
    """Copy tensors into the parameters of the same names, all or nothing.

    Full weights go into the frozen part of a model with adapters.

    Args:
        tensors: by name.
        complete: kinds (`lora`, `ttt`, `base`) of which the model may have no tensor that is not given.
        source: where they come from, for messages.

    Returns:
        How many tensors of the base (LoRA included) and of TTT were copied.

    Raises:
        CheckpointError: see `warm_start`; the line starts with source.
    """
    state = model.state_dict()
    headers = {name: header_of(tensor, file="the checkpoint") for name, tensor in tensors.items()}
    check_headers(headers, _shapes(model), complete=complete, source=source)
    check_finite(tensors, source=source)
    tensors = {name_in(state, name): tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
    num_ttt = sum(is_ttt_parameter(name) for name in tensors)
    return {"base": len(tensors) - num_ttt, "ttt": num_ttt}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours whose descriptions have been read, its weights not yet.

    Attributes:
        folder: with the files.
        step: of the training run.
        base: where the base model comes from.
        lora: shape of the adapters, None without.
        ttt: the `ttt:` section it was trained with.
        base_fingerprint: of the base model it was trained on, None where it is not known or not needed.
        first_codebook_weight: of the semantic codebook in the audio loss it was trained with
            (`first_codebook_weight_multiplier`), None where nothing says so.
    """

    folder: Path
    step: int
    base: ModelPaths
    lora: LoraArgs | None
    ttt: TTTArgs
    base_fingerprint: str | None
    first_codebook_weight: float | None = None


def open_checkpoint(path: str | Path, *, base: str | None = None) -> Checkpoint:
    """Find a checkpoint and read what it says about itself.

    Args:
        path: run directory (its newest checkpoint), checkpoint, or repository of the Hugging Face Hub.
        base: base model to use instead of the one it was trained on: a local folder or a repository.

    Raises:
        CheckpointError: there is none, a file is missing, or its configuration is damaged.
    """
    folder = find_checkpoint(path)
    config, training = read_json_object(folder / CONFIG_FILE), read_json_object(folder / TRAINING_FILE)
    check_config_values(config, source=str(folder / CONFIG_FILE))
    try:
        files = [_file_name(name) for name in training["files"]]
        paths = dict(training["moshi_paths"])
        ttt_args = build_args(TTTArgs, training["ttt"], "ttt.")
        lora = None
        if config["lora"]:
            shape = {"rank": config["lora_rank"], "scaling": config["lora_scaling"]}
            lora = build_args(LoraArgs, {"enable": True} | shape, "lora_")
        if base is not None:
            paths = {"hf_repo_id": base}
        fingerprint = training.get("base_fingerprint")
        if (folder / FULL_FILE).is_file():
            paths["moshi_path"], fingerprint = str(folder / FULL_FILE), None
        checkpoint = Checkpoint(
            folder,
            int(training["step"]),
            build_args(ModelPaths, paths),
            lora,
            ttt_args,
            fingerprint,
            _first_codebook_weight(training),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} or {TRAINING_FILE} is damaged: {error}") from None
    _require_files(folder, files, source=str(folder))
    check_sections(folder, config, ttt_args)
    check_announced(folder, config, lora=lora, ttt=ttt_args)
    return checkpoint


def load_checkpoint_model(
    path: str | Path,
    *,
    base: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    fuse_lora: bool = False,
) -> LMModel:
    """Rebuild the trained model from a checkpoint of ours, in evaluation mode, see `load_model`.

    Args:
        path, base: see `open_checkpoint`.
        device, dtype, fuse_lora: see `load_model`.

    Raises:
        CheckpointError: files are missing, corrupt or do not fit the base model.
    """
    checkpoint = open_checkpoint(path, base=base)
    info = find_model_files(checkpoint.base)
    return load_model(checkpoint, info, device=device, dtype=dtype, fuse_lora=fuse_lora)


def load_model(
    checkpoint: Checkpoint,
    info: CheckpointInfo,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    fuse_lora: bool = False,
) -> LMModel:
    """The model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: which one.
        info: files of the base model; its weights may be the checkpoint's own.
        device: of the model.
        dtype: of the model; initial fast weights, norms and gates stay in float32, as they were trained.
        fuse_lora: merge the adapters into the base weights.

    Raises:
        CheckpointError: files are missing, corrupt or do not fit the base model.
    """
    check_base(checkpoint, info)
    info = own_weights(checkpoint, info)
    model = load_base(info, device=device, dtype=dtype)
    if (checkpoint.folder / FULL_FILE).is_file():
        check_finite(model.state_dict(), source=str(info.moshi_weights))
    if checkpoint.lora is not None:
        add_lora(model, checkpoint.lora, dtype=dtype)
    try:
        apply_ttt_to_model(model, checkpoint.ttt)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None
    keep_ttt_precision(model)
    tensors = read_files(checkpoint.folder, (LORA_FILE, TTT_FILE))
    source = str(checkpoint.folder)
    counts = load_exactly(model, tensors, complete=("lora", "ttt"), source=source)
    weights = f"{counts['base']} adapter tensors" if checkpoint.lora is not None else "base weights"
    logger.info("Loaded %s: %s, %d TTT tensors.", source, weights, counts["ttt"])
    if fuse_lora:
        replace_lora_with_linear(model)
    return model.eval()


def check_base(checkpoint: Checkpoint, info: CheckpointInfo) -> None:
    """Compare a base model with the one that a checkpoint was trained on.

    Raises:
        CheckpointError: it is another one; checkpoints that hold all weights, or are old, fit any.
    """
    expected = checkpoint.base_fingerprint
    if expected is not None and base_fingerprint(info) != expected:
        raise CheckpointError(
            f"{checkpoint.folder}: was trained on another base model than {info.moshi_weights} holds."
        )


def own_weights(checkpoint: Checkpoint, info: CheckpointInfo) -> CheckpointInfo:
    """The files to load: adapters of the base repository are part of full weights already."""
    full = (checkpoint.folder / FULL_FILE).is_file()
    return replace(info, lora_weights=None) if full else info


def _read_descriptions(folder: Path) -> dict[str, Any]:
    """config.json, checked, of a checkpoint of ours or of moshi-finetune, which has no training.json."""
    config = read_json_object(folder / CONFIG_FILE)
    check_config_values(config, source=str(folder / CONFIG_FILE))
    if (folder / TRAINING_FILE).is_file():
        training = read_json_object(folder / TRAINING_FILE)
        try:
            files = [_file_name(name) for name in training["files"]]
            ttt = build_args(TTTArgs, training["ttt"], "ttt.")
        except (AttributeError, KeyError, TypeError, ValueError, ConfigError) as error:
            raise CheckpointError(f"init_from: {folder / TRAINING_FILE} is damaged: {error}") from None
        _require_files(folder, files, source=f"init_from: {folder}")
        check_sections(folder, config, ttt)
    return config


def _first_codebook_weight(training: Mapping[str, Any]) -> float | None:
    value = training.get(FIRST_CODEBOOK_KEY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{FIRST_CODEBOOK_KEY}: {value!r} is not a number greater than 0")
    return float(value)


def _require_files(folder: Path, names: Iterable[str], *, source: str) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{source}: {name} is missing, the checkpoint is not complete.")


def _file_name(value: object) -> str:
    if value not in WEIGHT_FILES:
        raise ValueError(f"files: {value!r} is no file of a checkpoint")
    return str(value)


def _shapes(model: LMModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
