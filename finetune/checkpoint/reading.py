"""Reading our checkpoints: as the start of another run, and as a model to use."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import replace_lora_with_linear
from torch import Tensor

from finetune.args import ModelPaths, TrainArgs
from finetune.base_model.fingerprint import is_same_base
from finetune.base_model.locate import (
    download_checkpoint,
    find_model_files,
    holds_base,
    is_hub_id,
    is_local_name,
)
from finetune.base_model.weight_files import check_finite, check_headers, name_in, read_files, read_headers
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.layout import (
    CONFIG_FILE,
    FULL_FILE,
    LORA_FILE,
    TRAINING_FILE,
    TTT_FILE,
    WEIGHT_FILES,
    list_checkpoints,
)
from finetune.errors import CheckpointError, ConfigError
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


class WarmStart(NamedTuple):
    """What a model got from a checkpoint.

    Attributes:
        lines: what was loaded, what starts fresh, and which settings differ from the checkpoint's.
        frozen: names of parameters that do not train and are no longer those of the base model, sorted. What
            the run saves must hold them.
    """

    lines: list[str]
    frozen: list[str]


def warm_start(
    model: LMModel, path: str | Path, args: TrainArgs, *, info: CheckpointInfo | None = None
) -> WarmStart:
    """Copy a checkpoint's adapters, TTT weights and gates into a model that will train.

    What the checkpoint does not have (TTT after a run with LoRA only, say) starts fresh. Full weights are
    copied for full fine-tuning only: otherwise they are the base model that this one was built from.

    Args:
        model: prepared, on any device.
        path: see `find_checkpoint`.
        args: of the run that starts.
        info: files of its base model, to be compared with the checkpoint's; None: not compared.

    Raises:
        CheckpointError: a tensor of the checkpoint has no place in the model, one that its configuration
            announces is missing, or a shape differs. The model is unchanged.
    """
    try:
        checkpoint = CheckpointDescription.read(find_checkpoint(path))
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {error}") from None
    config, source = checkpoint.config, f"init_from: {checkpoint.folder}"
    announced = [kind for kind in ("lora", "ttt") if config.get(kind)]
    headers = read_headers(checkpoint.folder, checkpoint.files)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_headers(headers, shapes, complete=announced, source=source)
    files = [name for name in checkpoint.files if name != FULL_FILE or args.full_finetuning]
    tensors = read_files(checkpoint.folder, files)
    _refuse_rounded(model, tensors, source=source)
    frozen = _frozen_changes(model, tensors)
    if frozen and not is_ttt_parameter(frozen[0]) and not (args.lora.enable or args.full_finetuning):
        raise CheckpointError(
            f"{source}: {frozen[0]} was trained beside LoRA adapters; it has a place with lora.enable only."
        )
    counts = _copy_weights(model, tensors, source=source)
    lines = [
        f"Warm start from {checkpoint.folder}: {counts['base']} base or LoRA tensors, "
        f"{counts['ttt']} TTT tensors."
    ]
    if len(files) < len(checkpoint.files):
        lines.append(f"Its full weights ({FULL_FILE}) are the base model of this run.")
    if frozen:
        lines.append(
            f"{len(frozen)} of these tensors do not train in this run, for example {frozen[0]}; they stay as "
            "they are there and are saved with what trains."
        )
    if args.ttt.enable and not counts["ttt"]:
        lines.append("The checkpoint has no TTT: the TTT layers and gates start fresh.")
    trained_on = checkpoint.base_fingerprint
    if info is not None and trained_on is not None and not is_same_base(info, trained_on):
        lines.append("Differs: the base model, the checkpoint was trained on another one.")
    if args.lora.enable and config.get("lora") and config["lora_scaling"] != args.lora.scaling:
        lines.append(
            f"Differs: lora.scaling is {args.lora.scaling}, the checkpoint had {config['lora_scaling']}."
        )
    for key in config.get("ttt", {}).keys() & (TTTOptions.__dataclass_fields__.keys() | {"base_lr"}):
        ours, theirs = getattr(args.ttt, key), config["ttt"][key]
        if ours != theirs:
            lines.append(f"Differs: ttt.{key} is {ours}, the checkpoint had {theirs}.")
    return WarmStart(lines, frozen)


def open_checkpoint(path: str | Path, *, base: str | None = None) -> CheckpointDescription:
    """Find a checkpoint, read what it says about itself and see that its files keep to it.

    Args:
        path: run directory (its newest checkpoint), checkpoint, or repository of the Hugging Face Hub; or a
            base model, where training starts.
        base: base model to use instead of the one it was trained on: a local folder or a repository. A
            checkpoint of moshi-finetune needs it, as it names none.

    Raises:
        CheckpointError: there is none, a file is missing, or its configuration is damaged.
    """
    try:
        folder = find_checkpoint(path)
    except CheckpointError:
        bare = _base_paths(path)
        if bare is None:
            raise
        if base is not None and Path(base).resolve() != Path(path).resolve():
            raise CheckpointError(f"{path}: is a base model itself; leave out --base {base}.") from None
        return CheckpointDescription.of_base(bare, find_model_files(bare))
    checkpoint = CheckpointDescription.read(folder)
    if base is not None:
        checkpoint = replace(checkpoint, base=ModelPaths(hf_repo_id=base))
    elif not checkpoint.training:
        raise CheckpointError(
            f"{folder}: names no base model (it has no {TRAINING_FILE}, as checkpoints of moshi-finetune); "
            "give the one it was trained on with --base (exporting: --base-model)."
        )
    checkpoint.verify()
    return checkpoint


def _base_paths(path: str | Path) -> ModelPaths | None:
    """Where a base model is that somebody gives in place of a checkpoint; None where there is none."""
    folder = Path(path)
    if not folder.exists() and is_hub_id(str(path)) and not is_local_name(path):
        return ModelPaths(hf_repo_id=str(path)) if holds_base(download_checkpoint(str(path))) else None
    return ModelPaths(hf_repo_id=str(folder.resolve())) if holds_base(folder) else None


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
    info = find_model_files(checkpoint.model_paths)
    return load_model(checkpoint, info, device=device, dtype=dtype, fuse_lora=fuse_lora)


def load_model(
    checkpoint: CheckpointDescription,
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
    checkpoint.verify_on(info)
    model = load_base(info, device=device, dtype=dtype)
    if checkpoint.lora is not None:
        add_lora(model, checkpoint.lora, dtype=dtype)
    try:
        apply_ttt_to_model(model, checkpoint.ttt)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from None
    keep_ttt_precision(model)
    source = str(checkpoint.folder)
    counts = _copy_weights(model, read_files(checkpoint.folder, (LORA_FILE, TTT_FILE)), source=source)
    weights = f"{counts['base']} adapter tensors" if checkpoint.lora is not None else "base weights"
    logger.info("Loaded %s: %s, %d TTT tensors.", source, weights, counts["ttt"])
    if fuse_lora:
        replace_lora_with_linear(model)
    return model.eval()


def check_base(checkpoint: CheckpointDescription, info: CheckpointInfo) -> None:
    """Compare a base model with the one that a checkpoint was trained on.

    Raises:
        CheckpointError: it is another one; checkpoints that hold all weights, or are old, fit any.
    """
    expected = checkpoint.base_fingerprint
    if not checkpoint.training and checkpoint.lora is not None:
        logger.warning(
            "%s: does not say which base model it was trained on, as checkpoints of moshi-finetune; that it "
            "is %s cannot be checked.",
            checkpoint.folder,
            info.moshi_weights,
        )
    if expected is not None and not is_same_base(info, expected):
        raise CheckpointError(
            f"{checkpoint.folder}: was trained on another base model than {info.moshi_weights} holds."
        )


def own_weights(checkpoint: CheckpointDescription, info: CheckpointInfo) -> CheckpointInfo:
    """The files to load: adapters of the base repository are part of full weights already."""
    return replace(info, lora_weights=None) if checkpoint.has_full_weights else info


def _refuse_rounded(model: LMModel, tensors: dict[str, Tensor], *, source: str) -> None:
    """See that no tensor would go into a weight that is rounded to whole numbers (`quantise`)."""
    state = model.state_dict()
    for name in tensors:
        if not state[name_in(state, name)].is_floating_point():
            raise CheckpointError(
                f"{source}: holds {name}, a base weight that quantise rounds; leave quantise out."
            )


def _frozen_changes(model: LMModel, tensors: dict[str, Tensor]) -> list[str]:
    """The parameters that do not train and that these tensors would change, in the order of their names.

    Base weights come first.
    """
    placed = {name_in(model.state_dict(), name): tensor for name, tensor in tensors.items()}
    changes = []
    for name, parameter in model.named_parameters():
        tensor = placed.get(name)
        if tensor is None or parameter.requires_grad:
            continue
        if parameter.is_meta or not torch.equal(tensor.to(parameter), parameter):
            changes.append(name)
    return sorted(changes, key=lambda name: (is_ttt_parameter(name), name))


def _copy_weights(model: LMModel, tensors: dict[str, Tensor], *, source: str) -> dict[str, int]:
    """Copy tensors whose headers were compared with the model; full weights go into what adapters freeze.

    Returns:
        How many tensors of the base (LoRA included) and of TTT were copied.

    Raises:
        CheckpointError: a value is not finite; the line starts with source. The model is unchanged.
    """
    check_finite(tensors, source=source)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            target = state[name_in(state, name)]
            assert target.shape == tensor.shape, name
            target.copy_(tensor)
    num_ttt = sum(map(is_ttt_parameter, tensors))
    return {"base": len(tensors) - num_ttt, "ttt": num_ttt}
