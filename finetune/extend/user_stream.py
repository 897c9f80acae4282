"""The user's stream predicted as Moshi's own is: the depth transformer goes on to the user's codebooks.

It takes K steps in a frame, one per codebook of Moshi; afterwards 2K. Step `K + k` begins as a copy of step
`k`: projection of the frame, norm and output head, and where steps have weights of their own attention and
feed-forward. Its input is the code before. Codebook `k` of the user is embedded as codebook `k` of Moshi is.
Moshi's last codebook never was an input; its embedding begins as that of its first, as J-Moshi's did.

The first K steps cannot see the later ones, so what Moshi says does not change.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from finetune.base_model.streams import streams_of
from finetune.errors import CheckpointError
from finetune.extend.tensor_file import Plan, PlannedTensor

_PER_CODEBOOK = re.compile(r"(linears|depformer_norms|depformer_emb)\.(\d+)(\..+)")
_PER_FRAME_PROJECTION = re.compile(r"(depformer_in)\.(\d+)(\..+)")
_PER_STEP = re.compile(r"(depformer\.layers\.\d+\.(?:gating|self_attn\.(?:in|out)_projs))\.(\d+)(\..+)")
_ALL_STEPS = re.compile(
    r"depformer\.layers\.\d+\.self_attn\.(in_proj_weight|in_proj\.weight|out_proj\.weight)"
)


def check_can_predict_user(config: Mapping[str, Any], *, source: str) -> None:
    """See that a model hears a user whom it does not predict yet.

    Args:
        config: arguments of `LMModel`.
        source: where they stand, the start of the line.

    Raises:
        CheckpointError: it is another kind of model.
    """
    n_q, dep_q = config["n_q"], config["dep_q"]
    num_predicted = streams_of(n_q=n_q, dep_q=dep_q).num_predicted
    if num_predicted != 1:
        what = "both voices already" if num_predicted else "no voice, it writes text only"
        raise CheckpointError(
            f"{source}: --predict-user: a model with n_q: {n_q} and dep_q: {dep_q} predicts {what}."
        )


def user_stream_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `LMModel` with the user's stream predicted."""
    changed = {"dep_q": 2 * config["dep_q"]}
    if config.get("depformer_context") is not None:  # in steps
        changed["depformer_context"] = 2 * config["depformer_context"]
    schedule, widths = _schedule(config), config.get("depformer_dim_feedforward")
    if schedule is not None:
        changed["depformer_weights_per_step_schedule"] = [
            *schedule,
            *(max(schedule) + 1 + index for index in schedule),
        ]
    if isinstance(widths, list):
        changed["depformer_dim_feedforward"] = widths * 2
    return {**config, **changed}


def plan_user_stream(plan: Plan, config: Mapping[str, Any]) -> Plan:
    """The tensors of a plan and those of the user's steps.

    Args:
        plan: of the model as it is.
        config: its arguments of `LMModel`.
    """
    num_steps, schedule = config["dep_q"], _schedule(config)
    num_weights = num_steps if schedule is None else max(schedule) + 1
    own_weights = config.get("depformer_weights_per_step", False)
    added: Plan = {}
    for name, tensor in plan.items():
        added |= _copied(_PER_CODEBOOK, name, tensor, num_steps)
        if config.get("depformer_multi_linear", False):
            added |= _copied(_PER_FRAME_PROJECTION, name, tensor, num_weights)
        if own_weights:
            added |= _copied(_PER_STEP, name, tensor, num_weights)
            if _ALL_STEPS.fullmatch(name):  # the weights of all steps in one, as in Moshi's published files
                shape = (2 * tensor.shape[0], *tensor.shape[1:])
                added[name] = replace(tensor, shape=shape, make=_twice)
        if name.startswith("depformer_emb.0."):
            added[name.replace(".0.", f".{num_steps - 1}.", 1)] = tensor
    return plan | added


def _copied(pattern: re.Pattern[str], name: str, tensor: PlannedTensor, distance: int) -> Plan:
    found = pattern.fullmatch(name)
    return {f"{found[1]}.{int(found[2]) + distance}{found[3]}": tensor} if found else {}


def _schedule(config: Mapping[str, Any]) -> list[int] | None:
    return config.get("depformer_weights_per_step_schedule")


def _twice(tensor: Tensor) -> Tensor:
    return tensor.repeat(2, *[1] * (tensor.dim() - 1))
