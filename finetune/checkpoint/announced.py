"""What `config.json` and `training.json` announce, held against each other and against the weight files."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.args import LoraArgs, TTTArgs
from finetune.base_model.locate import lm_arguments
from finetune.base_model.weight_files import check_headers, read_headers
from finetune.checkpoint.layout import CONFIG_FILE, FULL_FILE, TRAINING_FILE, TTT_FILE, WEIGHT_FILES
from finetune.config_io import build_args, yaml_text
from finetune.errors import CheckpointError, ConfigError
from finetune.ttt_integration import apply_ttt_to_model
from finetune.wrapped_model import add_lora, load_without_weights

_OF_ONE_MACHINE = "inner_loop_plot_dir"


def check_sections(folder: Path, config: Mapping[str, Any], ttt: TTTArgs) -> None:
    """Both files hold the `ttt` section, and config.json has it exactly where there are TTT weights.

    The weights do not show a changed `mini_batch_size` or `base_lr`, which make another model all the same.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        ttt: the section of its training.json.

    Raises:
        CheckpointError: they disagree; names the key and both values.
    """
    has_weights = (folder / TTT_FILE).is_file()
    if ("ttt" in config) != has_weights:
        there, missing = ("section ttt", TTT_FILE) if "ttt" in config else (TTT_FILE, "section ttt")
        raise CheckpointError(f"{folder}: has a {there} but no {missing}; {CONFIG_FILE} and files disagree.")
    if not has_weights:
        return
    try:
        theirs = build_args(TTTArgs, config["ttt"], "ttt.")
    except (AttributeError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: damaged: {error}") from None
    for field in dataclasses.fields(TTTArgs):
        first, second = getattr(theirs, field.name), getattr(ttt, field.name)
        if first != second and field.name != _OF_ONE_MACHINE:
            raise CheckpointError(
                f"{folder}: ttt.{field.name} is {yaml_text(first)} in {CONFIG_FILE} but {yaml_text(second)} "
                f"in {TRAINING_FILE}; one of them was changed after training."
            )


def check_announced(folder: Path, config: Mapping[str, Any], *, lora: LoraArgs | None, ttt: TTTArgs) -> None:
    """Compare the headers of all weight files with the model that the descriptions announce.

    That model is built without memory, so a description may lie about sizes at no cost.

    Args:
        folder: of the checkpoint.
        config: its config.json, which describes the base model too.
        lora: shape of the adapters, None without.
        ttt: the `ttt` section.

    Raises:
        CheckpointError: a tensor is missing, unknown, twice there, no floating-point one or of another shape;
            names file, tensor and values.
    """
    headers = read_headers(folder, WEIGHT_FILES)
    has_full = (folder / FULL_FILE).is_file()
    shapes = _announced_shapes(folder, config, lora=lora, ttt=ttt)
    complete = ("lora", "ttt", "base") if has_full else ("lora", "ttt")
    check_headers(headers, shapes, complete=complete, source=str(folder))


def _announced_shapes(
    folder: Path, config: Mapping[str, Any], *, lora: LoraArgs | None, ttt: TTTArgs
) -> dict[str, tuple[int, ...]]:
    model = load_without_weights(
        lm_arguments(config), dtype=torch.float32, source=f"{folder / CONFIG_FILE}: the configuration"
    )
    if lora is not None:
        add_lora(model, lora, dtype=torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the model could not do: this one does nothing
            apply_ttt_to_model(model, ttt)
    except ConfigError as error:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} and {TRAINING_FILE} do not fit each other: {error}"
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
