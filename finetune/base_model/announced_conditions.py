"""The conditions that a model's configuration announces, looked at before Moshi builds them.

Moshi makes conditioners in memory, of any size that a configuration names, before it reads their weights.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo, get_conditioner_provider

from finetune.base_model.locate import MOSHI_ERRORS, describe_error
from finetune.base_model.weight_files import read_header
from finetune.errors import CheckpointError

CONDITION_PREFIX = "condition_provider."

_METHODS = ("sum", "cross")


def check_condition_config(config: Mapping[str, Any], *, source: str) -> None:
    """See that all conditions are texts and reach the model.

    Args:
        config: arguments of `LMModel`.
        source: where they stand, the start of the line.

    Raises:
        CheckpointError: a condition is no text, or is fused in a way that `LMModel.forward` does not know, or
            not at all.
    """
    conditioners, fuser = config.get("conditioners") or {}, config.get("fuser") or {}
    if not isinstance(conditioners, dict) or not isinstance(fuser, dict):
        raise CheckpointError(f"{source}: conditioners and fuser must be sections of keys and values.")
    for name, section in conditioners.items():
        kind = section.get("type") if isinstance(section, dict) else None
        if kind != "lut":
            raise CheckpointError(
                f"{source}: conditioner {name!r} is of type {kind!r}; only texts ('lut') are supported, "
                "a model with other conditions, such as a speaker's voice, cannot be used."
            )
    if fuser.get("prepend"):
        raise CheckpointError(f"{source}: fuser: Moshi cannot prepend conditions, only sum and cross.")
    names = {method: _names(fuser, method, source=source) for method in _METHODS}
    fused = {name for part in names.values() for name in part}
    for name in sorted(fused.symmetric_difference(conditioners)):
        missing = "conditioners" if name in fused else "fuser"
        raise CheckpointError(
            f"{source}: condition {name!r} is missing in {missing}; it would have no effect."
        )
    if bool(names["cross"]) != bool(config.get("cross_attention")):
        raise CheckpointError(
            f"{source}: cross_attention is {bool(config.get('cross_attention'))}, but the fuser has "
            f"{len(names['cross'])} conditions under cross; one needs the other."
        )


def check_conditioner_sizes(info: CheckpointInfo) -> None:
    """Hold the conditioners of a configuration against the headers of the weights; nothing is built.

    Raises:
        CheckpointError: they are not what the file holds, or not what `check_condition_config` allows.
    """
    config, path = info.lm_config or {}, Path(info.moshi_weights)
    check_condition_config(config, source=f"configuration of {path}")
    if not config.get("conditioners"):
        return
    try:
        with torch.device("meta"):
            provider = get_conditioner_provider(config["dim"], "meta", copy.deepcopy(config))
        announced = {f"{CONDITION_PREFIX}{name}": list(t.shape) for name, t in provider.state_dict().items()}
    except MOSHI_ERRORS as error:
        raise CheckpointError(
            f"configuration of {path}: the conditioners are not those of Moshi: {describe_error(error)}"
        ) from None
    held = {name: list(h.shape) for name, h in read_header(path).items() if name.startswith(CONDITION_PREFIX)}
    for name in sorted(announced.keys() | held.keys()):
        if announced.get(name) != held.get(name):
            raise CheckpointError(
                f"{path}: {name} has shape {held.get(name, 'none, it is missing')}, its configuration "
                f"announces {announced.get(name, 'no such tensor')}."
            )


def with_own_config(info: CheckpointInfo) -> CheckpointInfo:
    """The same with a configuration of its own: Moshi writes into the conditioners' while it builds them."""
    return dataclasses.replace(info, lm_config=copy.deepcopy(info.lm_config))


def _names(fuser: Mapping[str, Any], method: str, *, source: str) -> list[str]:
    names = fuser.get(method) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: fuser: {method} must be a list of names of conditions.")
    return names
