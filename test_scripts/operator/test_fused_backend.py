"""Where the Triton kernels run, why not where they do not, and what they need; the kernels' own tests."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernel_resources import KERNELS, resources
from finetune.args import TrainArgs
from finetune.config_io import build_args
from moshi_ttt import backends
from moshi_ttt.backends import choose_backend
from moshi_ttt.fused import support
from moshi_ttt.fused.layouts import LAYOUTS
from moshi_ttt.fused.support import PRECISIONS, why_not
from moshi_ttt.ops import ttt_mlp_with_states
from project_root import ROOT
from ttt_inputs import assert_close, make_inputs

H100 = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232_448)
A100 = SimpleNamespace(major=8, minor=0, shared_memory_per_block_optin=166_912)
RTX_4090 = SimpleNamespace(major=8, minor=9, shared_memory_per_block_optin=101_376)
V100 = SimpleNamespace(major=7, minor=0, shared_memory_per_block_optin=98_304)
DIMS = (128, 512, 128)
# Bytes per thread over all shapes. Those of the largest one decide the speed in Moshi 7B.
MOST_SPILLED = {
    90: {
        ("scan_forward", "tf32"): 1200,
        ("scan_forward", "bf16"): 950,
        ("scan_forward", "tf32x3"): 3000,
        ("scan_backward", "tf32"): 2800,
        ("scan_backward", "bf16"): 3700,
        ("scan_backward", "tf32x3"): 9300,
    },
    80: {
        ("scan_forward", "tf32"): 1500,
        ("scan_forward", "bf16"): 1500,
        ("scan_forward", "tf32x3"): 5700,
        ("scan_backward", "tf32"): 3600,
        ("scan_backward", "bf16"): 3700,
        ("scan_backward", "tf32x3"): 7800,
    },
}


class _OnGPU:
    """Stands in for tokens on a GPU that this machine does not have."""

    device, dtype = torch.device("cuda", 0), torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """Make a GPU seem to be there; a function that takes its properties."""

    def plug_in(properties, *, triton=True, compiler=True):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(support, "has_triton", lambda: triton)
        monkeypatch.setattr(backends, "_has_compiler", lambda device: compiler)
        monkeypatch.setattr(backends, "is_fake", lambda tokens: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return _OnGPU()

    backends._say_once.cache_clear()
    precision = torch.get_float32_matmul_precision()
    yield plug_in
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", LAYOUTS[9], ids=str)
def test_auto_is_fused_for_every_supported_shape_on_a_hopper_gpu(shape, precision, gpu):
    torch.set_float32_matmul_precision(precision)
    dims = (shape[0], 4 * shape[0], shape[0])
    assert choose_backend("auto", gpu(H100), dims=dims, mini_batch_size=shape[1]) == "fused"


@pytest.mark.parametrize(
    ("properties", "size", "expected"),
    [(A100, 64, "fused"), (RTX_4090, 16, "fused"), (RTX_4090, 64, "compiled"), (V100, 16, "compiled")],
    ids=["A100-64", "4090-16", "4090-64", "V100"],
)
def test_older_gpus_run_what_fits_into_their_shared_memory(properties, size, expected, gpu):
    torch.set_float32_matmul_precision("high")
    assert choose_backend("auto", gpu(properties), dims=DIMS, mini_batch_size=size) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dims": (96, 384, 96)}, "the widths of the inner MLP are 96-384-96, not one of 32-128-32,"),
        ({"dims": (128, 256, 128)}, "the widths of the inner MLP are 128-256-128"),
        ({"dims": (128, 512, 512, 128)}, "the widths of the inner MLP are 128-512-512-128"),
        ({"mini_batch_size": 8}, "mini_batch_size is 8, not one of 16, 32, 64"),
        ({"inner_grad_clip": 1.0}, "inner_grad_clip is set"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_what_the_kernels_cannot_do_is_said_and_the_next_backend_taken(backend, given, reason, gpu, caplog):
    with caplog.at_level(logging.INFO, logger="moshi_ttt"):
        for _ in range(2):
            assert choose_backend(backend, gpu(H100), **{"dims": DIMS, **given}) == "compiled"
    assert [reason in line for line in caplog.messages] == [True]  # once


def test_without_triton_or_a_compiler_a_gpu_runs_the_operator_by_hand(gpu, caplog):
    with caplog.at_level(logging.INFO, logger="moshi_ttt"):
        tokens = gpu(H100, triton=False, compiler=False)
        assert choose_backend("auto", tokens, dims=DIMS) == "manual"
    assert "Triton is not installed or does not know this GPU" in caplog.text


def test_double_precision_is_not_for_the_kernels(gpu):
    tokens = gpu(H100)
    tokens.dtype = torch.float64
    assert "float64" in why_not(tokens, DIMS, 16, clips=False)


def test_a_state_that_decays_is_left_to_autograd_on_a_gpu_too(gpu):
    assert choose_backend("fused", gpu(H100), dims=DIMS, state_decay=0.1) == "autograd"


def test_tokens_that_are_not_real_are_traced_by_hand():
    with FakeTensorMode():
        fake = torch.zeros(1)
    for tokens in (fake, torch.zeros(1, device="meta")):
        assert choose_backend("fused", tokens, dims=DIMS) == "manual"


def test_on_a_cpu_fused_is_the_operator_by_hand_and_the_log_says_why(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._say_once.cache_clear()
    inputs = make_inputs(num_tokens=40, head_dim=32, dtype=torch.float32, requires_grad=False)
    with caplog.at_level(logging.INFO, logger="moshi_ttt"):
        found, _ = ttt_mlp_with_states(*inputs, mini_batch_size=16, backend="fused")
    expected, _ = ttt_mlp_with_states(*inputs, mini_batch_size=16, backend="manual")
    assert_close(found, expected, 0)
    assert "does without its fused kernels" in caplog.text


def test_a_configuration_may_name_the_backend():
    assert build_args(TrainArgs, {"ttt": {"enable": True, "backend": "fused"}}).ttt.backend == "fused"


def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "NO_TORCH_COMPILE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_scripts/kernels"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "s" not in result.stdout.splitlines()[0], "a test was passed over"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS.values())
@pytest.mark.parametrize("shape", LAYOUTS[9], ids=str)
@pytest.mark.parametrize("arch", [90, 80])
def test_kernels_need_no_more_of_a_gpu_than_is_said(arch, shape, precision):
    pytest.importorskip("triton")
    for kernel in KERNELS:
        found = resources(kernel, arch, shape, precision)
        assert found.shared <= LAYOUTS[arch // 10][shape].shared[precision]
        assert found.registers <= 255
        assert max(found.spilled) <= MOST_SPILLED[arch][kernel, precision]
        if arch == 90:
            assert found.shared <= H100.shared_memory_per_block_optin
