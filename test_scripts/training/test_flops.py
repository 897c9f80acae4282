"""Model FLOPs against a count of real steps and against counts by hand."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.training.optim import build_optimizer
from finetune.training.plan.flops import (
    _ATTENTION,
    attention_flops,
    counted_flops,
    peak_flops,
    training_flops_per_frame,
)
from memory_measure import TINY, real_model, train_step
from run_helpers import MODES


def make_args(mode: str, **overrides) -> TrainArgs:
    values = MODES[mode] | {"param_dtype": "float32", "gradient_checkpointing": False, "duration_sec": 7.68}
    return build_args(TrainArgs, values | overrides)


@pytest.mark.parametrize("mode", MODES)
def test_flops_are_those_of_a_real_step(mode):
    args = make_args(mode)
    args = replace(args, ttt=replace(args.ttt, backend="autograd"))  # the others compute something again
    model = real_model(args, TINY)
    counter = FlopCounterMode(display=False, custom_mapping={op: lambda *a, **k: 0 for op in _ATTENTION})
    with counter:
        train_step(model, args, build_optimizer(model, args))
    assert counted_flops(args, TINY) == pytest.approx(counter.get_total_flops() / args.chunk_frames, rel=1e-6)


@pytest.mark.slow
def test_recomputation_does_not_count():
    assert counted_flops(make_args("lora_ttt", gradient_checkpointing=True), TINY) == counted_flops(
        make_args("lora_ttt"), TINY
    )


@pytest.mark.slow
def test_the_backend_does_not_count():
    args = make_args("lora_ttt")
    by_hand = replace(args, ttt=replace(args.ttt, backend="manual"))
    by_autograd = replace(args, ttt=replace(args.ttt, backend="autograd"))
    assert counted_flops(by_hand, TINY) == counted_flops(by_autograd, TINY)


def test_linear_layers_by_hand():
    args = make_args("full")
    model = real_model(args, TINY)
    linear = sum(p.numel() for n, p in model.named_parameters() if "emb" not in n and p.dim() == 2)
    assert counted_flops(args, TINY) == pytest.approx(6 * linear)


def test_frozen_layers_without_gradient_cost_their_forward_pass_only():
    # TTT in the last layer alone: the gradient flows no further down.
    last, full = make_args("ttt", ttt=MODES["ttt"]["ttt"] | {"layers": "3"}), make_args("full_ttt")
    assert counted_flops(last, TINY) < 0.7 * counted_flops(full, TINY)


def test_attention_by_hand():
    args = make_args("full", duration_sec=0.32)  # 4 frames
    main = 3 * 4 * 128 * (1 + 2 + 3 + 4) / 4 * 4
    depformer = 3 * 4 * 64 * 8 * 4.5 * 2
    assert attention_flops(args, TINY) == pytest.approx(main + depformer)
    assert attention_flops(args, TINY | {"context": 2}) == pytest.approx(main * 7 / 10 + depformer)
    assert training_flops_per_frame(args, TINY) == counted_flops(args, TINY) + attention_flops(args, TINY)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 2080", None),
    ],
)
def test_known_gpus(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), None) == (None if tflops is None else tflops * 1e12)
    assert peak_flops(torch.device("cuda"), 3.0) == 3e12


def test_other_devices_have_no_known_peak():
    assert peak_flops(torch.device("cpu"), None) is None
