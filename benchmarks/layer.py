"""A training step of one layer of Moshi 7B, with and without TTT.

Shapes: B batch rows, T frames.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.memory import peak_bytes
from benchmarks.moshi_layer import add_ttt, make_stock_layer, num_parameters

NUM_FRAMES = 500
QUICK_NUM_FRAMES = 40
_LEARNING_RATE = 1e-6
MODES = {"everything trains": False, "base frozen": True}  # whether the base is frozen


def run(settings: Settings) -> dict[str, Any]:
    """Forward pass, backward pass and AdamW step, B = 1.

    The input always needs a gradient, as that of every layer above the first trained one does. Two modes:
    everything trains; and the base is frozen, where the layer with TTT trains TTT weights and gate, and the
    layer without passes the gradient on to its input and trains nothing, so its step has no optimiser.
    """
    modes = {}
    for name in MODES:
        case = training_case(name, settings)
        times = interleaved(case.calls, settings)
        # Now the optimisers have their states, which count as there before.
        peaks = {key: peak_bytes(call, settings.device) for key, call in case.calls.items()}
        modes[name] = {
            "parameters": case.parameters,
            "candidates": {key: times[key].record() | {"peak_bytes": peaks[key]} for key in case.calls},
            "with_over_without": times["with ttt"].median / times["without ttt"].median,
            "memory_with_over_without": peaks["with ttt"] / peaks["without ttt"],
        }
        del case
        gc.collect()  # the modules and optimisers of this mode, before those of the next one
    return {"num_frames": num_frames(settings), "dtype": settings.dtype_name, "modes": modes}


class TrainingCase(NamedTuple):
    """A layer in one mode, with TTT and without."""

    calls: dict[str, Callable[[], None]]  # a training step each
    parameters: dict[str, int]  # of the base, and of TTT with its gate


def num_frames(settings: Settings) -> int:
    """T."""
    return QUICK_NUM_FRAMES if settings.quick else NUM_FRAMES


def training_case(mode: str, settings: Settings) -> TrainingCase:
    """Both layers have the same base weights, the same tensors, so they fit into memory together.

    Args:
        mode: of `MODES`.
        settings: of the run.
    """
    base_frozen = MODES[mode]
    without = make_stock_layer(settings).requires_grad_(not base_frozen)
    with_ttt = add_ttt(without, settings)
    base = list(without.parameters())
    ttt = [*with_ttt.ttt.parameters(), *with_ttt.forward_ssm_gating.parameters()]
    base_optimizers = [] if base_frozen else [_adamw(base)]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, num_frames(settings), with_ttt.ttt.config.model_dim)
    x, cotangent = torch.randn(shape, generator=generator).to(settings.device, settings.dtype)
    x.requires_grad_()
    return TrainingCase(
        {
            "without ttt": partial(_step, without, x, cotangent, base_optimizers),
            "with ttt": partial(_step, with_ttt, x, cotangent, [*base_optimizers, _adamw(ttt)]),
        },
        {"base": num_parameters(base), "ttt": num_parameters(ttt)},
    )


def _adamw(parameters: Sequence[nn.Parameter]) -> AdamW:
    """As `finetune.training.optim` makes it."""
    return AdamW(parameters, lr=_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def _step(layer: nn.Module, x: Tensor, cotangent: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """One training step; `x` and `cotangent` `[1, T, dim]`. No gradient stays."""
    layer(x).backward(cotangent)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    x.grad = None
