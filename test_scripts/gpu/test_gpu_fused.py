"""The Triton kernels on an NVIDIA GPU: right, the same each time, and never waiting for ever."""

import subprocess
import sys

import pytest
import torch

from benchmarks.common.inputs import Size, make_inputs
from moshi_ttt.backends import choose_backend
from moshi_ttt.ops import ttt_mlp
from project_root import ROOT

pytestmark = pytest.mark.gpu

TOLERANCES = {"highest": 1e-5, "high": 2e-3, "medium": 1e-2}
_MANY_PROGRAMS = """
import torch
from benchmarks.common.inputs import Size, make_inputs
from moshi_ttt.ops import ttt_mlp
for batch_size in (1, 2, 5):
    inputs = make_inputs(Size(batch_size, 32, 128, 16, 70), torch.device("cuda"), requires_grad=True)
    out = ttt_mlp(*inputs, mini_batch_size=16, backend="fused")
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), inputs.tensors()))
"""


@pytest.fixture(params=TOLERANCES)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def _results(inputs, backend, *, size, causal):
    out = ttt_mlp(*inputs, mini_batch_size=size, causal=causal, backend=backend)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * cotangent).sum(), inputs.tensors())]


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        (Size(1, 32, 128, 16, 50), True),
        (Size(1, 32, 128, 16, 500), True),
        (Size(2, 4, 64, 32, 200), False),
        (Size(1, 4, 32, 64, 130), True),
    ],
    ids=str,
)
def test_values_and_gradients_equal_those_in_float64(shape, causal, precision):
    inputs = make_inputs(shape, torch.device("cuda"), requires_grad=True)
    exact = type(inputs)(*(x.double() if torch.is_tensor(x) else [y.double() for y in x] for x in inputs))
    dims = (shape.head_dim, 4 * shape.head_dim, shape.head_dim)
    assert choose_backend("auto", inputs.xq, dims=dims, mini_batch_size=shape.mini_batch_size) == "fused"
    settings = {"size": shape.mini_batch_size, "causal": causal}
    pairs = zip(_results(inputs, "fused", **settings), _results(exact, "manual", **settings), strict=True)
    for single, double in pairs:
        error = (single.double() - double).norm() / double.norm()
        assert error < TOLERANCES[precision], f"relative error {error:.1e}"


def test_twenty_runs_have_equal_bits():
    inputs = make_inputs(Size(1, 32, 128, 16, 200), torch.device("cuda"), requires_grad=True)
    first = _results(inputs, "fused", size=16, causal=True)
    for _ in range(19):
        again = _results(inputs, "fused", size=16, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_programs_than_the_device_has_units_end():
    command = [sys.executable, "-c", _MANY_PROGRAMS]
    subprocess.run(command, cwd=ROOT, timeout=90, check=True)
