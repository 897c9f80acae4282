"""A training step of one layer of Moshi 7B, with and without TTT.

Shapes: B batch rows, T frames.
"""

import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.memory import peak_bytes
from benchmarks.moshi_layer import add_ttt, make_stock_layer, num_parameters
from benchmarks.settings import Settings
from benchmarks.timing import interleaved

NUM_FRAMES = 500
QUICK_NUM_FRAMES = 40
_LEARNING_RATE = 1e-6
_MODES = {"everything trains": False, "base frozen": True}


def run(settings: Settings) -> dict[str, Any]:
    """Forward pass, backward pass and AdamW step, B = 1.

    The input always needs a gradient, as that of every layer above the first trained one does. Two modes:
    everything trains; and the base is frozen, where the layer with TTT trains TTT weights and gate, and the
    layer without passes the gradient on to its input and trains nothing, so its step has no optimiser.
    """
    num_frames = QUICK_NUM_FRAMES if settings.quick else NUM_FRAMES
    modes = {}
    for name, base_frozen in _MODES.items():
        modes[name] = _mode(settings, num_frames, base_frozen)
        gc.collect()  # the modules and optimisers of this mode, before those of the next one
    return {"num_frames": num_frames, "dtype": settings.dtype_name, "modes": modes}


def _mode(settings: Settings, num_frames: int, base_frozen: bool) -> dict[str, Any]:
    """Both layers have the same base weights, the same tensors, so they fit into memory together."""
    without = make_stock_layer(settings).requires_grad_(not base_frozen)
    with_ttt = add_ttt(without, settings)
    base = list(without.parameters())
    ttt = [*with_ttt.ttt.parameters(), *with_ttt.forward_ssm_gating.parameters()]
    base_optimizers = [] if base_frozen else [_adamw(base)]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, num_frames, with_ttt.ttt.config.model_dim)
    x, cotangent = torch.randn(shape, generator=generator).to(settings.device, settings.dtype)
    x.requires_grad_()
    calls = {
        "without ttt": partial(_step, without, x, cotangent, base_optimizers),
        "with ttt": partial(_step, with_ttt, x, cotangent, [*base_optimizers, _adamw(ttt)]),
    }
    times = interleaved(calls, settings)
    # Now the optimisers have their states, which count as there before.
    peaks = {name: peak_bytes(call, settings.device) for name, call in calls.items()}
    return {
        "parameters": {"base": num_parameters(base), "ttt": num_parameters(ttt)},
        "candidates": {name: times[name].record() | {"peak_bytes": peaks[name]} for name in calls},
        "with_over_without": times["with ttt"].median / times["without ttt"].median,
        "memory_with_over_without": peaks["with ttt"] / peaks["without ttt"],
    }


def _adamw(parameters: Sequence[nn.Parameter]) -> AdamW:
    """As `finetune.optim` makes it."""
    return AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _step(layer: nn.Module, x: Tensor, cotangent: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """One training step; `x` and `cotangent` `[1, T, dim]`. No gradient stays."""
    layer(x).backward(cotangent)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    x.grad = None
