"""A checkpoint as a folder for other libraries, and a model of transformers as a base model for this one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import MIMI_NAME, MOSHI_NAME, TEXT_TOKENIZER_NAME, CheckpointInfo
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.args import ModelPaths
from finetune.base_model.locate import find_model_files, is_hub_id, lm_arguments, lm_config
from finetune.base_model.untrusted import check_config_values
from finetune.base_model.weight_files import check_finite, check_headers, read_headers, read_tensors
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.layout import CONFIG_FILE, LORA_FILE, TTT_FILE
from finetune.checkpoint.reading import open_checkpoint
from finetune.errors import CheckpointError, ConfigError
from finetune.export.formats.names import to_ours, to_theirs
from finetune.export.formats.peft import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Adapter,
    adapter_of_moshi,
    adapter_of_transformers,
)
from finetune.export.formats.transformers_config import (
    moshi_config,
    sizes_of,
    their_sizes,
    transformers_config,
)
from finetune.export.merge import merged_tensors, plan_merge
from finetune.files import new_folder, read_json_object
from finetune.wrapped_model import load_without_weights

FORMATS = ("peft", "peft-transformers", "transformers", "kyutai")
WEIGHTS = "model.safetensors"
_METADATA = {"format": "pt"}  # transformers wants to be told
_CODEC_NAMES = ("audio_encoder.",)


def export_in_format(
    name: str, checkpoint: str | Path, out: Path, *, base_model: str | None = None, dtype: str = "auto"
) -> None:
    """Write a folder in one of `FORMATS`, complete or not at all.

    Args:
        name: the format.
        checkpoint: run, checkpoint or base model; for `kyutai` a folder as transformers saves it.
        out: the folder to make.
        base_model: Hub id or local folder that replaces where training found the base model; for `kyutai` the
            repository whose codec and tokenizer belong to the model.
        dtype: of whole models; `auto` as `finetune.export.merge.plan_merge`, or of the tensors as they are.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint is damaged or of a kind that the format has no place for, or the
            folder exists or cannot be written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; choose another --out, nothing is overwritten.")
    if name == "kyutai":
        if base_model is None:
            raise ConfigError(
                "--format kyutai: give with --base-model the Moshi repository whose codec and tokenizer "
                "belong to the model, which transformers stores in another form."
            )
        _write_base_model(Path(checkpoint), out, base_model)
        return
    source = open_checkpoint(checkpoint, base=base_model)
    _refuse_ttt(source, name)
    if name == "transformers":
        _write_transformers(source, out, dtype)
    else:
        _write_adapter(source, out, name)


def _refuse_ttt(source: CheckpointDescription, name: str) -> None:
    if TTT_FILE in source.files:
        raise CheckpointError(
            f"{source.folder}: has TTT layers, which --format {name} has no place for; "
            "export without --format."
        )
    windows = (source.ttt.ttt_layer_context, source.ttt.non_ttt_layer_context)
    if source.ttt.enable and any(window is not None for window in windows):
        raise CheckpointError(
            f"{source.folder}: was trained with attention windows of its own (ttt.non_ttt_layer_context), "
            f"which --format {name} has no place for; export without --format."
        )


def _write_adapter(source: CheckpointDescription, out: Path, name: str) -> None:
    if source.lora is None or LORA_FILE not in source.files:
        raise CheckpointError(
            f"{source.folder}: holds no LoRA adapters, of which --format {name} makes a file; "
            "--format transformers writes the whole model."
        )
    base = source.base.hf_repo_id or ""
    tensors = read_tensors(source.folder / LORA_FILE)
    check_finite(tensors, source=str(source.folder))
    try:
        if name == "peft":
            is_on_hub = is_hub_id(base) and not Path(base).exists()
            found, config = adapter_of_moshi(tensors, source.lora, base_model=base if is_on_hub else None)
        else:
            found, config = _for_transformers(source, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source.folder}: {error}") from None
    with _folder(out) as partial:
        save_file(found, partial / ADAPTER_FILE, _METADATA)
        _write_json(partial / ADAPTER_CONFIG, config)


def _for_transformers(source: CheckpointDescription, tensors: dict[str, Tensor]) -> Adapter:
    assert source.lora is not None
    arguments = lm_arguments(source.config)
    shapes = _announced_shapes(arguments, source=str(source.folder / CONFIG_FILE))
    transformers_config(arguments, shapes, dtype="float32", source=CONFIG_FILE)  # is it of a kind that fits?
    return adapter_of_transformers(tensors, source.lora, sizes_of(arguments, shapes))


def _write_transformers(source: CheckpointDescription, out: Path, dtype: str) -> None:
    arguments = lm_arguments(source.config)
    shapes = _announced_shapes(arguments, source=str(source.folder / CONFIG_FILE))
    where = str(source.folder / CONFIG_FILE)
    transformers_config(arguments, shapes, dtype="float32", source=where)  # before anything is read
    plan = plan_merge(source, source.training | {"files": list(source.files), "moshi_paths": {}}, dtype=dtype)
    config = transformers_config(arguments, shapes, dtype=plan.dtype, source=where)
    with _folder(out) as partial:
        tensors = dict(to_theirs(merged_tensors(plan), sizes_of(arguments, shapes)))
        save_file(tensors, partial / WEIGHTS, _METADATA)
        _write_json(partial / CONFIG_FILE, config)


def _write_base_model(theirs: Path, out: Path, base_model: str) -> None:
    config = read_json_object(theirs / CONFIG_FILE)
    if config.get("model_type") != "moshi" or "depth_decoder_config" not in config:
        raise CheckpointError(
            f"{theirs / CONFIG_FILE}: is not that of transformers' Moshi; --format kyutai converts a folder "
            "written by its save_pretrained, or by --format transformers."
        )
    base = find_model_files(ModelPaths(hf_repo_id=base_model))
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{theirs}: holds no .safetensors file.")
    headers = read_headers(theirs, names)
    shapes = {name: header.shape for name, header in headers.items() if not name.startswith(_CODEC_NAMES)}
    source = str(theirs / CONFIG_FILE)
    try:
        ours = moshi_config(config, shapes, lm_config(base), source=source)
    except (ArithmeticError, LookupError, TypeError) as error:
        raise CheckpointError(f"{source}: does not fit the tensors beside it ({error}).") from None
    check_config_values(ours, source=source)
    ours |= {"moshi_name": MOSHI_NAME, "mimi_name": MIMI_NAME, "tokenizer_name": TEXT_TOKENIZER_NAME}
    expected = _announced_shapes(lm_arguments(ours), source=source)
    with _folder(out) as partial:
        tensors = {n: t for file in names for n, t in read_tensors(theirs / file).items() if n in shapes}
        try:
            found = to_ours(tensors, their_sizes(config, shapes, source=source))
        except RuntimeError as error:
            raise CheckpointError(f"{source}: does not fit the tensors beside it ({error}).") from None
        check_finite(found, source=str(theirs))
        save_file(found, partial / MOSHI_NAME)
        written = read_headers(partial, [MOSHI_NAME])
        check_headers(written, expected, complete=("base",), source=str(theirs))
        _copy_voice(base, ours, partial)
        _write_json(partial / CONFIG_FILE, ours)


def _copy_voice(base: CheckpointInfo, config: dict[str, Any], folder: Path) -> None:
    """Codec and tokenizer, under the names that config.json gives them."""
    shutil.copyfile(base.mimi_weights, folder / MIMI_NAME)
    shutil.copyfile(base.tokenizer, folder / TEXT_TOKENIZER_NAME)
    config.pop("mimi_config_name", None)
    if base.mimi_config is not None:
        config["mimi_config_name"] = "mimi_config.json"
        _write_json(folder / "mimi_config.json", dict(base.mimi_config))


def _announced_shapes(arguments: dict[str, Any], *, source: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a Moshi with these arguments."""
    model = load_without_weights(arguments, dtype=torch.float32, source=f"{source}: the configuration")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    try:
        with new_folder(out) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: the export cannot be written ({error}).") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
