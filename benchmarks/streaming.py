"""Streaming at the shapes of Moshi 7B: what one frame costs.

Shapes: B batch rows, H heads, D head_dim, C mini_batch_size.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from moshi.modules.streaming import StreamingModule
from torch import Tensor, nn

from benchmarks.common.inputs import Inputs, Size, make_inputs
from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.moshi_layer import add_ttt, make_stock_layer, num_parameters, ttt_config
from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_loop import InnerLoop, InnerNetwork
from moshi_ttt.streaming import TTTStreamingState
from moshi_ttt.ttt_layer import TTTLayer

NUM_LAYERS = 16  # with 17 MB of fast weights each
QUICK_NUM_LAYERS = 2


def run(settings: Settings) -> dict[str, Any]:
    """The inner step beside a read of its fast weights, and the layers beside one another."""
    with torch.no_grad():
        return {"inner_step": _inner_step(settings), "layers": _layers(settings)}


def _inner_step(settings: Settings) -> dict[str, Any]:
    """Seconds per frame of `TTTStreamingState.step`, one row, over whole mini-batches.

    The frame goes through a stack of layers, each with weights of its own: together they are larger than a
    cache, so that weights come from memory as in a model, where other layers run in between.

    The floor is one read of the fast weights, which a frame cannot do without, in two ways: a sum, the
    plainest read there is, and the product of every head's weights with a vector, a read that computes
    something useful. The faster of the two counts.
    """
    config = ttt_config(settings)
    size = Size(1, config.num_heads, config.head_dim, config.mini_batch_size, config.mini_batch_size)
    num_layers = QUICK_NUM_LAYERS if settings.quick else NUM_LAYERS
    stack = [make_inputs(size, settings.device, requires_grad=False, seed=seed) for seed in range(num_layers)]
    states = [_streaming_state(config, inputs) for inputs in stack]
    frames = [stack[0].cut(i, i + 1)[:4] for i in range(size.num_tokens)]
    weights = [
        weight.squeeze(0) for state in states for weight in state.buffers.start_weights
    ]  # [H, in, out]
    vectors = [weight.new_ones(len(weight), 1, weight.shape[1]) for weight in weights]
    calls = {
        "step": partial(_steps, states, frames),
        "sum": partial(_sums, weights, len(frames)),
        "product with a vector": partial(_products, weights, vectors, len(frames)),
    }
    times = interleaved(calls, settings)
    num_bytes = sum(weight.nbytes for weight in weights) // num_layers
    floor = min((name for name in calls if name != "step"), key=lambda name: times[name].median)
    frames_per_call = len(frames) * num_layers
    return {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "mini_batch_size": config.mini_batch_size,
        "dtype": "float32",
        "layers": num_layers,
        "fast_weight_bytes": num_bytes,
        "candidates": {name: times[name].record(per=frames_per_call) for name in calls},
        "floor": floor,
        "floor_bytes_per_second": num_bytes * frames_per_call / times[floor].median,
        "step_over_floor": times["step"].median / times[floor].median,
    }


def _streaming_state(config: TTTConfig, inputs: Inputs) -> TTTStreamingState:
    network = InnerNetwork(tuple(inputs.weights), tuple(inputs.biases), inputs.ln_weight, inputs.ln_bias)
    inner = InnerLoop(network, config.inner, dtype=torch.float32)
    return TTTStreamingState(1, inputs.xq.device, inner)


def _steps(states: Sequence[TTTStreamingState], frames: Sequence[tuple[Tensor, ...]]) -> None:
    for frame in frames:
        for state in states:
            state.step(*frame)


def _sums(weights: Sequence[Tensor], times: int) -> None:
    for _ in range(times):
        for weight in weights:
            weight.sum()


def _products(weights: Sequence[Tensor], vectors: Sequence[Tensor], times: int) -> None:
    for _ in range(times):
        for weight, vector in zip(weights, vectors, strict=True):
            vector @ weight


def _layers(settings: Settings) -> dict[str, Any]:
    """Seconds per frame of the TTT layer, of a Moshi layer without it, and of the two together.

    All stream, one row: the Moshi layers with their attention cache, which has a slot for every frame of the
    attention window and costs the same however many are in use.
    """
    config = ttt_config(settings)
    stock = make_stock_layer(settings)
    ttt = TTTLayer(config, device=settings.device, dtype=settings.dtype)
    unshifted = TTTLayer(replace(config, key_shift=0), device=settings.device, dtype=settings.dtype)
    hybrid = add_ttt(stock, settings)
    modules: dict[str, StreamingModule] = {
        "ttt layer": ttt,
        "ttt layer without key shift": unshifted,
        "moshi layer": stock,
        "moshi layer with ttt": hybrid,
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.mini_batch_size, config.model_dim, generator=generator)
    frames = x.to(settings.device, settings.dtype).split(1, 1)
    with ExitStack() as stack:
        for module in modules.values():
            stack.enter_context(module.streaming(1))
        calls = {name: partial(_frames, module, frames) for name, module in modules.items()}
        times = interleaved(calls, settings)
    alone = times["moshi layer"].median
    return {
        "model_dim": config.model_dim,
        "dtype": settings.dtype_name,
        "attention_window": stock.self_attn.context,
        "parameters": {name: num_parameters(module.parameters()) for name, module in modules.items()},
        "candidates": {name: times[name].record(per=len(frames)) for name in calls},
        "ttt_over_moshi": times["ttt layer"].median / alone,
        "key_shift_over_none": times["ttt layer"].median / times["ttt layer without key shift"].median,
        "with_over_without": times["moshi layer with ttt"].median / alone,
    }


def _frames(module: nn.Module, frames: Sequence[Tensor]) -> None:
    for frame in frames:
        module(frame)
