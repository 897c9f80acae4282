"""Floating-point operations of training, and what a device can do at most.

Model FLOPs: a multiply-add is two, what gradient checkpointing computes again does not count, and attention
counts only the keys that a query may see.

Shapes: T frames of a chunk, C mini_batch_size.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.args import TrainArgs
from finetune.base_model.locate import find_architecture
from finetune.base_model.streams import depth_layers
from finetune.training.plan.fake_step import StepPart, fake_model, layer_kinds, reduced, run_step, walk
from finetune.ttt_integration import attention_windows
from finetune.wrapped_model import build_meta_model
from moshi_ttt.hybrid_model import transformer_layers

# Dense bfloat16 (V100: float16) peaks in TFLOP/s from NVIDIA's data sheets, without sparsity; the first
# name that the device's name contains counts.
_PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
)
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


@dataclass(frozen=True)
class Utilisation:
    """How much of what the devices can do goes into the model.

    Attributes:
        flops_per_frame: of `training_flops_per_frame`.
        peak_flops: of one device, FLOP/s.
    """

    flops_per_frame: float
    peak_flops: float

    def metrics(self, frames_per_sec: float) -> dict[str, float]:
        """`model_tflops` and `mfu` of one device, for the frames per second of one device."""
        flops = self.flops_per_frame * frames_per_sec
        return {"model_tflops": flops / 1e12, "mfu": flops / self.peak_flops}


def utilisation(args: TrainArgs, device: torch.device) -> Utilisation | None:
    """For a run as configured; None where the device's peak is not known."""
    peak = peak_flops(device, args.peak_tflops)
    if peak is None:
        return None
    lm_kwargs, _ = find_architecture(args.moshi_paths)
    return Utilisation(training_flops_per_frame(args, lm_kwargs), peak)


def training_flops_per_frame(args: TrainArgs, lm_kwargs: dict[str, Any]) -> float:
    """Model FLOPs of forward and backward pass per frame of one batch row.

    Everything but attention is counted while the real step runs on fake tensors. Weights that do not train
    need the gradient of their input only, and nothing where no gradient flows.
    """
    return counted_flops(args, lm_kwargs) + attention_flops(args, lm_kwargs)


def counted_flops(args: TrainArgs, lm_kwargs: dict[str, Any]) -> float:
    """All but attention, counted over one and two mini-batches; later ones are like the second."""
    num_frames, size = args.chunk_frames, args.ttt.mini_batch_size
    short = min(num_frames, size)
    flops = _count(args, lm_kwargs, num_frames=short)
    if short == num_frames or not args.ttt.enable:
        return flops / short
    more = _count(args, lm_kwargs, num_frames=2 * size)
    return (flops + (num_frames / size - 1) * (more - flops)) / num_frames


def attention_flops(args: TrainArgs, lm_kwargs: dict[str, Any]) -> float:
    """The share of attention: products with the visible keys and values, twice that in the backward pass."""
    model = build_meta_model(args, lm_kwargs)
    num_frames, total = args.chunk_frames, 0.0
    layers = transformer_layers(model.transformer)
    stack = zip(layers, layer_kinds(model), attention_windows(model), strict=True)
    for layer, kind, window in stack:
        before = [*layer.norm1.parameters(), *layer.self_attn.parameters()]
        has_gradient = kind.input_grad or any(parameter.requires_grad for parameter in before)
        total += 4 * model.dim * _mean_visible(num_frames, window) * (3 if has_gradient else 1)
    for layer in depth_layers(model):
        # Its input holds the main transformer's output, which has a gradient in all modes.
        total += 3 * 4 * layer.self_attn.embed_dim * model.dep_q * _mean_visible(model.dep_q, None)
    return total


def peak_flops(device: torch.device, override_tflops: float | None) -> float | None:
    """Peak FLOP/s of a device in dense bfloat16; None where it is not known.

    Args:
        device: known by its CUDA name.
        override_tflops: takes the place of the table, TFLOP/s.
    """
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), None)


def _count(args: TrainArgs, lm_kwargs: dict[str, Any], *, num_frames: int) -> float:
    """FLOPs of a step of one row without attention, layer by layer of each kind."""
    model = build_meta_model(args, lm_kwargs)
    num_depformer_layers = len(depth_layers(model))
    kinds = [kind._replace(first=False) for kind in layer_kinds(model)]
    small_args, small_kwargs, chosen = reduced(args, lm_kwargs, kinds)
    small_kwargs["depformer_num_layers"] = 1
    by_part: Counter[StepPart] = Counter()
    ignored = dict.fromkeys(_ATTENTION, _nothing)
    counter = FlopCounterMode(display=False, custom_mapping=ignored)
    current, before = StepPart("embedding"), 0

    def mark(part: StepPart) -> None:
        nonlocal current, before
        total = counter.get_total_flops()
        by_part[current] += total - before
        current, before = part, total

    # The other backends compute part of the forward pass again.
    ttt = replace(small_args.ttt, backend="autograd")
    small_args = replace(small_args, batch_size=1, gradient_checkpointing=False, ttt=ttt)
    with fake_model(small_args, small_kwargs) as fake, counter:
        run_step(fake, small_args, num_frames=num_frames, mark=mark)
        mark(StepPart("embedding"))
    total = 0
    for part in walk(len(kinds), num_depformer_layers):
        index = chosen.index(kinds[part.index]) if part.name == "layer" else 0
        total += by_part[replace(part, index=index)]
    return total


def _mean_visible(num_queries: int, window: int | None) -> float:
    """Keys that a causal query sees, on average."""
    window = num_queries if window is None else min(window, num_queries)
    return (window * (window + 1) / 2 + (num_queries - window) * window) / num_queries


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0
