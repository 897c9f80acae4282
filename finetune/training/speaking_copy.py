"""A copy of a training model that can stream, for samples and long recordings."""

import copy

import torch
from moshi.models.lm import LMModel

from finetune.args import TrainArgs
from finetune.base_model.conditions import condition_parameters
from finetune.base_model.int8_linear import quantised_parameters
from finetune.base_model.locate import find_architecture
from finetune.base_model.streams import speak_only
from finetune.distributed import is_main
from finetune.sharding import full_tensor, is_sharded
from finetune.ttt_integration import float32_parameters
from finetune.wrapped_model import build_meta_model


def speaking_copy(args: TrainArgs, model: LMModel) -> LMModel | None:
    """A copy of a training model that can speak; every process must call it.

    Returns:
        None in processes other than the main one.
    """
    dtype = getattr(torch, args.param_dtype)
    if is_sharded(model):
        return _gathered(args, model, dtype)
    return _copy_to_speak(model, dtype) if is_main() else None


def _gathered(args: TrainArgs, model: LMModel, dtype: torch.dtype) -> LMModel | None:
    """The same of a sharded model, whose tensors are gathered one after the other."""
    speaker = build_meta_model(args, find_architecture(args.moshi_paths)[0])
    kept = _kept(speaker)
    names = {name for name, parameter in speaker.named_parameters() if id(parameter) not in kept}
    tensors = {}
    for name, tensor in model.state_dict().items():
        whole = full_tensor(tensor.detach())
        if is_main():
            tensors[name] = whole.to(dtype) if name in names else whole
    if not is_main():
        return None
    speaker.load_state_dict(tensors, assign=True)
    return _without_checkpointing(speaker)


def _copy_to_speak(model: LMModel, dtype: torch.dtype) -> LMModel:
    """A copy in one dtype (the attention cache takes that of the first LoRA weight it finds).

    Frozen weights that have the dtype already, or are rounded to whole numbers, are shared, not copied.
    """
    rounded = {id(p) for p in quantised_parameters(model)}
    shared = {
        id(p): p for p in model.parameters() if not p.requires_grad and (p.dtype == dtype or id(p) in rounded)
    }
    speaker = copy.deepcopy(model, shared)
    kept = _kept(speaker) | rounded
    for parameter in speaker.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return _without_checkpointing(speaker)


def _kept(speaker: LMModel) -> set[int]:
    """The ids of parameters that are float32 in a model of any dtype."""
    return {id(parameter) for parameter in (*float32_parameters(speaker), *condition_parameters(speaker))}


def _without_checkpointing(speaker: LMModel) -> LMModel:
    speaker.transformer.checkpointing = False
    if speaker.depformer is not None:
        speaker.depformer.checkpointing = False
    return speak_only(speaker).eval()
