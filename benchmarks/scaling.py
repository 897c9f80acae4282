"""Cost against the length of the sequence: training grows in a straight line, the memory of inference not.

Shapes: B batch rows, H heads, T tokens, D head_dim, C mini_batch_size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.common.inputs import Inputs, Size, make_inputs
from benchmarks.common.settings import Settings
from benchmarks.common.timing import interleaved
from benchmarks.memory import peak_bytes
from benchmarks.operator import forward_backward
from moshi_ttt.ops import ttt_mlp, ttt_mlp_with_states

SIZE = Size(1, 4, 64, 16, 32_768)
GPU_SIZE = Size(1, 32, 128, 16, 16_384)
QUICK_SIZE = Size(1, 2, 16, 4, 512)
_CHUNKS_OF_THE_SHORTEST = 4


def run(settings: Settings) -> dict[str, Any]:
    """The operator as it chooses its backend itself: forward and backward pass, and inference in chunks."""
    largest = GPU_SIZE if settings.device.type == "cuda" else SIZE
    if settings.quick:
        largest = QUICK_SIZE
    halvings = range(3 if settings.quick else 5, -1, -1)
    sizes = [largest._replace(num_tokens=largest.num_tokens >> halving) for halving in halvings]
    chunk_tokens = sizes[0].num_tokens // _CHUNKS_OF_THE_SHORTEST
    training, inference = {}, {}
    for size in sizes:
        inputs = make_inputs(size, settings.device, requires_grad=True)
        training[size.num_tokens] = partial(_train, inputs, size.mini_batch_size)
        inference[size.num_tokens] = partial(_infer, inputs, size.mini_batch_size, chunk_tokens)
    lengths = [size.num_tokens for size in sizes]
    training_peaks = [peak_bytes(training[length], settings.device) for length in lengths]
    inference_peaks = [peak_bytes(inference[length], settings.device) for length in lengths]
    times = interleaved({str(length): call for length, call in training.items()}, settings)
    medians = [times[str(length)].median for length in lengths]
    return {
        "size": largest._asdict(),
        "backend": "auto",
        "chunk_tokens": chunk_tokens,
        "lengths": [
            {
                "num_tokens": length,
                "forward_backward": times[str(length)].record() | {"peak_bytes": training_peak},
                "inference": {"peak_bytes": inference_peak},
            }
            for length, training_peak, inference_peak in zip(
                lengths, training_peaks, inference_peaks, strict=True
            )
        ],
        "time_line": straight_line(lengths, medians),
        "memory_line": straight_line(lengths, training_peaks),
        "inference_memory_growth": max(inference_peaks) / min(inference_peaks),
    }


def straight_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The line of least squares: `slope` per unit of x, `intercept`, and `r_squared`, 1 for a perfect fit."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.square(np.asarray(y) - (slope * np.asarray(x) + intercept)).sum()
    total = np.square(np.asarray(y) - np.mean(y)).sum()
    return {"slope": float(slope), "intercept": float(intercept), "r_squared": float(1 - rest / total)}


def _train(inputs: Inputs, mini_batch_size: int) -> None:
    operator = partial(_operator, mini_batch_size=mini_batch_size)
    forward_backward(operator, inputs, torch.ones_like(inputs.xq))


def _operator(inputs: Inputs, *, mini_batch_size: int) -> torch.Tensor:
    return ttt_mlp(*inputs, mini_batch_size=mini_batch_size, backend="auto")


@torch.no_grad()
def _infer(inputs: Inputs, mini_batch_size: int, chunk_tokens: int) -> None:
    """Chunk after chunk with carried state; outputs are dropped, as those of a conversation are."""
    state = None
    for start in range(0, inputs.xq.shape[2], chunk_tokens):
        part = inputs.cut(start, start + chunk_tokens)
        _, state = ttt_mlp_with_states(*part, mini_batch_size=mini_batch_size, state=state, backend="auto")
