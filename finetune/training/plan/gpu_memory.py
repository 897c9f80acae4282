"""Memory of a training run on one GPU, before anything is allocated."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moshi.models.lm import LMModel
from torch import nn

from finetune.args import TrainArgs
from finetune.base_model.streams import depth_layers
from finetune.training.parallel import choose_strategy, gradients_wait
from finetune.training.plan.activations import StepPeak, step_peak
from finetune.wrapped_model import build_meta_model
from moshi_ttt.hybrid_model import ttt_layers

_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU. Not all items are there at once, so the peak is at most their sum."""

    weights: int
    gradients: int
    optimizer: int  # both moments of AdamW
    activations: int  # the most they take, in forward or backward pass
    ttt_memory: int  # fast weights carried between chunks
    sharding: int  # fsdp: gathered weights and gradients not yet scattered
    peak: int


def estimate_memory(
    args: TrainArgs,
    lm_kwargs: dict[str, Any],
    *,
    num_gpus: int,
    step: StepPeak | None = None,
) -> MemoryEstimate:
    """Estimate the memory of training as `args` says, `args.gradient_checkpointing` included.

    Args:
        args: the configuration.
        lm_kwargs: arguments of `LMModel`.
        num_gpus: GPUs of the run, one process each.
        step: of `trace_memory`, which takes seconds and does not depend on the number of GPUs.

    Raises:
        ConfigError: `parallel` does not fit this number of GPUs.
        CheckpointError: an architecture that cannot train.
    """
    num_shards = num_shards_of(args, num_gpus)
    model = build_meta_model(args, lm_kwargs)
    if step is None:
        step = step_peak(args, lm_kwargs, model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sharded = num_shards is not None
    weights = _share(_num_bytes(model.parameters()), num_shards)
    gradients = _share(_FLOAT32 * trainable, num_shards)
    optimizer = 2 * gradients
    gathered = _working_set(model) if sharded else 0
    if sharded and gradients_wait(args):
        gathered += _FLOAT32 * trainable - gradients  # those of earlier micro-batches, not in shards yet
    memory = _carried_memory(model, args)
    kept = weights + optimizer + memory
    backward = kept + gathered + _gradients_and_activations(args, step, gradients, sharded)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=step.activations,
        ttt_memory=memory,
        sharding=gathered,
        peak=max(backward, kept + gradients),
    )


def trace_memory(args: TrainArgs, lm_kwargs: dict[str, Any]) -> StepPeak:
    """What activations and new gradients take, for estimates that differ in `parallel` only."""
    return step_peak(args, lm_kwargs, build_meta_model(args, lm_kwargs))


def num_shards_of(args: TrainArgs, num_gpus: int) -> int | None:
    """Processes that share one copy of the model; None where each has all of it.

    Raises:
        ConfigError: `parallel` does not fit this number of GPUs.
    """
    sharded = choose_strategy(args, num_gpus) == "fsdp"
    return num_gpus // args.parallel.replicas if sharded else None


def _gradients_and_activations(args: TrainArgs, step: StepPeak, gradients: int, sharded: bool) -> int:
    """The most of both together: later micro-batches find the gradients of earlier ones."""
    if args.num_microbatches > 1 or sharded:
        return gradients + step.activations
    return step.with_gradients


def _working_set(model: LMModel) -> int:
    """What FSDP2 holds unsharded: the root group, two layers (it prefetches one), and new gradients.

    The root group, all parameters outside the layers, stays gathered through forward and backward pass,
    and its gradients are scattered at the end.
    """
    layers = [*model.transformer.layers, *depth_layers(model)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    root = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    weights = [_num_bytes(layer.parameters()) for layer in layers]
    gradients = [_gradient_bytes(layer.parameters()) for layer in layers]
    two = max((a + b for a, b in pairwise(weights)), default=sum(weights))
    return _num_bytes(root) + two + _gradient_bytes(root) + max(gradients, default=0)


def _carried_memory(model: LMModel, args: TrainArgs) -> int:
    """Fast weights of the recordings of a step, before and after it, with those being read and written.

    A row keeps a set of fast weights and the keys, values and inner rates of a mini-batch, in float32.
    """
    if not args.ttt.persistent_states:
        return 0
    per_row = 0
    for layer in ttt_layers(model).values():
        config = layer.config
        fast = sum(p.numel() for p in (*layer.weights, *layer.biases))
        pending = config.mini_batch_size * (2 * config.model_dim + config.num_heads)
        per_row += _FLOAT32 * (fast + pending)
    return per_row * args.batch_size * (2 * args.num_microbatches + 2)


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(_FLOAT32 * parameter.numel() for parameter in parameters if parameter.requires_grad)


def _share(num_bytes: int, num_shards: int | None) -> int:
    return math.ceil(num_bytes / (num_shards or 1))
