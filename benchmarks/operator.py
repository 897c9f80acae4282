"""The operator's backends beside the published scan: time, peak memory, share of the matrix rate.

Shapes: B batch rows, H heads, T tokens, D head_dim, C mini_batch_size.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.scan_autograd import scan_ttt_mlp
from benchmarks.common.inputs import Inputs, Size, make_inputs
from benchmarks.common.settings import Settings
from benchmarks.common.timing import Times, interleaved
from benchmarks.memory import peak_bytes
from moshi_ttt.ops import ttt_mlp

logger = logging.getLogger(__name__)

Operator = Callable[[Inputs], Tensor]

SIZES = (
    Size(1, 4, 64, 16, 2048),
    Size(1, 8, 128, 16, 2048),
    Size(1, 8, 128, 64, 2048),
    Size(1, 32, 128, 16, 500),
)
QUICK_SIZES = (Size(1, 2, 16, 4, 30),)
BASELINES = {"scan, checkpointed": 16, "scan": 0}  # mini-batches that are recomputed together
_MATRIX_PRODUCT = "matrix product"
# Relative to the largest value; float32 sums over thousands of tokens.
_TOLERANCES = {"outputs": 1e-3, "gradients": 1e-2}


class UnequalResultsError(Exception):
    """A candidate computes something else than the others, so its time says nothing."""


def run(settings: Settings) -> dict[str, Any]:
    """All sizes, causal and not, each in forward and in forward and backward pass."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    return {"cases": [_case(size, causal, settings) for size in sizes for causal in (True, False)]}


def operators(size: Size, *, causal: bool, settings: Settings) -> dict[str, Operator]:
    """The candidates by name: the backends, then the baselines."""
    ours: dict[str, Operator] = {
        backend: partial(_ours, mini_batch_size=size.mini_batch_size, causal=causal, backend=backend)
        for backend in settings.backends
    }
    scans: dict[str, Operator] = {
        name: partial(_scan, mini_batch_size=size.mini_batch_size, causal=causal, checkpoint_group_size=group)
        for name, group in BASELINES.items()
    }
    return ours | scans


def forward(operator: Operator, inputs: Inputs) -> Tensor:
    """Outputs `[B, H, T, D]`, without a graph."""
    with torch.no_grad():
        return operator(inputs)


def forward_backward(operator: Operator, inputs: Inputs, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `sum(outputs * cotangent)` to all inputs, flat; cotangent `[B, H, T, D]`."""
    out = operator(inputs)
    return torch.autograd.grad(out, inputs.tensors(), cotangent)


def _ours(inputs: Inputs, **settings: Any) -> Tensor:
    return ttt_mlp(*inputs, **settings)


def _scan(inputs: Inputs, **settings: Any) -> Tensor:
    return scan_ttt_mlp(*inputs, **settings)[0]


def _case(size: Size, causal: bool, settings: Settings) -> dict[str, Any]:
    logger.info("%s, %s", size.name, "causal" if causal else "not causal")
    inputs = make_inputs(size, settings.device, requires_grad=True)
    cotangent = torch.randn(inputs.xq.shape, generator=torch.Generator().manual_seed(1)).to(settings.device)
    candidates = operators(size, causal=causal, settings=settings)
    differences = check_equal(candidates, inputs, cotangent)
    passes: dict[str, tuple[Callable[..., object], tuple[object, ...], int]] = {
        "forward": (forward, (inputs,), size.forward_flops),
        "forward_backward": (forward_backward, (inputs, cotangent), 3 * size.forward_flops),
    }
    results = {}
    for name, (function, arguments, flops) in passes.items():
        calls = {key: partial(function, operator, *arguments) for key, operator in candidates.items()}
        results[name] = _measure(calls, flops, settings)
    return {"size": size._asdict(), "causal": causal, "largest_differences": differences, **results}


def check_equal(
    candidates: dict[str, Operator], inputs: Inputs, cotangent: Tensor
) -> dict[str, dict[str, float]]:
    """Outputs and gradients of all candidates against those of the last one.

    Args:
        candidates: by name.
        inputs: leaves that need gradients.
        cotangent: of the outputs, `[B, H, T, D]`.

    Returns:
        Largest differences by candidate and by `outputs` and `gradients`, relative to the largest value.

    Raises:
        UnequalResultsError: a difference is above the tolerance.
    """
    *names, reference = candidates

    def results(name: str) -> dict[str, tuple[Tensor, ...]]:
        operator = candidates[name]
        return {
            "outputs": (forward(operator, inputs),),
            "gradients": forward_backward(operator, inputs, cotangent),
        }

    expected = results(reference)
    differences: dict[str, dict[str, float]] = {}
    for name in names:
        found = results(name)
        differences[name] = {
            kind: max(map(_difference, found[kind], expected[kind])) for kind in ("outputs", "gradients")
        }
        for kind, difference in differences[name].items():
            if not difference <= _TOLERANCES[kind]:
                raise UnequalResultsError(
                    f"{name}: {kind} differ from those of {reference} by {difference:.1e}."
                )
    return differences


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _measure(calls: Mapping[str, Callable[[], object]], flops: int, settings: Settings) -> dict[str, Any]:
    """Times beside a matrix product, peak memory, and the ratios to the baselines."""
    peaks = {name: peak_bytes(call, settings.device) for name, call in calls.items()}
    dim = 256 if settings.quick else 2048
    left, right = (torch.randn(dim, dim, device=settings.device) for _ in range(2))
    times = interleaved({**calls, _MATRIX_PRODUCT: lambda: left @ right}, settings)
    rate = 2 * dim**3 / times[_MATRIX_PRODUCT].best
    return {
        "useful_flops": flops,
        "matrix_product": {"dim": dim, "best_flops_per_second": rate, **times[_MATRIX_PRODUCT].record()},
        "candidates": {name: _record(name, times, peaks, flops / rate) for name in calls},
    }


def _record(
    name: str, times: dict[str, Times], peaks: dict[str, int], least_seconds: float
) -> dict[str, Any]:
    """One candidate.

    Args:
        name: of the candidate.
        times, peaks: of all candidates, peaks in bytes.
        least_seconds: the useful FLOPs at the rate of the matrix product.
    """
    return {
        **times[name].record(),
        "peak_bytes": peaks[name],
        "share_of_matrix_rate": least_seconds / times[name].median,
        "times_faster_than": {base: times[base].median / times[name].median for base in BASELINES},
        "memory_relative_to": {base: peaks[name] / peaks[base] for base in BASELINES},
    }
