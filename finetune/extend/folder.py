"""The folder of an extended model, in the layout of a repository of the Hugging Face Hub."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo

from finetune.args import ModelPaths
from finetune.base_model.locate import find_model_files, lm_arguments, lm_config
from finetune.base_model.text import load_tokenizer
from finetune.base_model.weight_files import read_header
from finetune.errors import CheckpointError, ConfigError
from finetune.extend.tensor_file import Plan, plan_copy, write_planned
from finetune.extend.user_stream import check_can_predict_user, plan_user_stream, user_stream_config
from finetune.extend.vocabulary import (
    Vocabulary,
    match_vocabularies,
    plan_vocabulary,
    read_new_tokenizer,
    vocabulary_config,
)
from finetune.files import new_folder, write_json
from finetune.wrapped_model import load_without_weights

_CONFIG_FILE = "config.json"
_FILES = {
    "moshi_name": "model.safetensors",
    "mimi_name": "mimi.safetensors",
    "mimi_config_name": "mimi_config.json",
    "tokenizer_name": "tokenizer.model",
}
_DEFAULTS = {"n_q": 8, "dep_q": 8, "card": 1024, "text_card": 32000}  # of `LMModel`


@dataclass(frozen=True)
class Extension:
    """What became of a model.

    Attributes:
        num_parameters: of the language model, before and after.
        num_steps: of the depth transformer in a frame, before and after.
        vocabulary: where its pieces come from; None: the tokenizer is the old one.
    """

    num_parameters: tuple[int, int]
    num_steps: tuple[int, int]
    vocabulary: Vocabulary | None


def extend_model(
    base: str, out: Path, *, tokenizer: Path | None = None, predict_user: bool = False, seed: int = 0
) -> Extension:
    """Write a new model, complete or not at all; weights go from file to file, one tensor at a time.

    Args:
        base: local folder, or repository of the Hub.
        out: folder to make.
        tokenizer: a sentencepiece model that takes the place of the model's own.
        predict_user: let the depth transformer predict the user's codebooks too.
        seed: of what is drawn for new pieces.

    Raises:
        ConfigError: a file is missing, or nothing is to be changed.
        CheckpointError: the model or the tokenizer cannot be used, or the folder exists or cannot be written.
    """
    if tokenizer is None and not predict_user:
        raise ConfigError("--tokenizer FILE, --predict-user or both: otherwise nothing would change.")
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; choose another --out, nothing is overwritten.")
    info = find_model_files(ModelPaths(hf_repo_id=base))
    if info.lora_weights is not None:
        raise CheckpointError(
            f"{base}: has LoRA adapters beside its weights (lora_name in config.json), which are not "
            "extended; give a model whose weights are whole."
        )
    old = _DEFAULTS | lm_config(info)
    config, plan = dict(old), plan_copy(read_header(Path(info.moshi_weights)))
    source = f"configuration of {info.moshi_weights}"
    num_before = _check_size(plan, config, source=source)
    vocabulary = None
    if predict_user:
        check_can_predict_user(config, source=source)
        plan = plan_user_stream(plan, config)
        config = user_stream_config(config)
    if tokenizer is not None:
        vocabulary = match_vocabularies(load_tokenizer(info, old), read_new_tokenizer(tokenizer, old), config)
        plan = plan_vocabulary(plan, vocabulary, seed=seed)
        config = vocabulary_config(config, vocabulary)
    num_after = _check_size(plan, config, source=source)
    _write(out, info, config, plan, Path(info.tokenizer) if tokenizer is None else tokenizer)
    return Extension((num_before, num_after), (old["dep_q"], config["dep_q"]), vocabulary)


def _check_size(plan: Plan, config: dict[str, Any], *, source: str) -> int:
    """The number of parameters, which file and configuration must agree on.

    Names are not compared, since Moshi renames tensors of its published files while it loads them.
    """
    planned = sum(tensor.num_values for tensor in plan.values())
    model = load_without_weights(lm_arguments(config), dtype=torch.bfloat16, source=source)
    announced = sum(tensor.numel() for tensor in model.state_dict().values())
    if planned != announced:
        raise CheckpointError(f"{source}: announces {announced:,} parameters, the file holds {planned:,}.")
    return planned


def _write(out: Path, info: CheckpointInfo, config: dict[str, Any], plan: Plan, tokenizer: Path) -> None:
    names = dict(_FILES)
    if info.mimi_config is None:
        del names["mimi_config_name"]  # the codec is the one that the moshi package knows
    try:
        with new_folder(out) as partial:
            write_planned(plan, Path(info.moshi_weights), partial / names["moshi_name"])
            shutil.copyfile(info.mimi_weights, partial / names["mimi_name"])
            shutil.copyfile(tokenizer, partial / names["tokenizer_name"])
            if info.mimi_config is not None:
                write_json(partial / names["mimi_config_name"], info.mimi_config)
            described = {key: value for key, value in config.items() if key not in _FILES}
            write_json(partial / _CONFIG_FILE, {"model_type": info.model_type} | names | described)
    except OSError as error:
        raise CheckpointError(f"{out}: the model cannot be written ({error}).") from None
