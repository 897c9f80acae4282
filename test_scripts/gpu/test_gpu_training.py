"""Training on an NVIDIA GPU: the losses of the CPU, and resumable."""

import shutil

import pytest
import torch

from finetune.training.run import run_training
from run_helpers import MODES, read_metrics, run_args, saved_weights

pytestmark = pytest.mark.gpu

SETTINGS = {"max_steps": 4, "num_microbatches": 2, "batch_size": 1, "duration_sec": 3.84}


def train(demo, run_dir, mode, **overrides):
    run_training(run_args(demo, run_dir, mode, **(SETTINGS | overrides)))
    return read_metrics(run_dir, "train")


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradient_norms_are_those_of_the_cpu(demo, tmp_path, mode):
    on_cpu, on_gpu = (train(demo, tmp_path / name, mode, device=name) for name in ("cpu", "cuda"))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        for key in ("loss", "text_loss", "audio_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["step"], key)
    assert on_gpu[-1]["peak_memory_gb"] > 0


def test_bfloat16_trains_close_to_float32(demo, tmp_path):
    single = train(demo, tmp_path / "a", "lora_ttt", device="cuda")
    half = train(demo, tmp_path / "b", "lora_ttt", device="cuda", param_dtype="bfloat16")
    assert half[-1]["loss"] == pytest.approx(single[-1]["loss"], rel=0.03)
    assert half[-1]["loss"] != single[-1]["loss"]


@pytest.mark.parametrize("mode", ["full_ttt", "lora_ttt"])
def test_a_resumed_run_ends_with_the_same_weights(demo, tmp_path, mode):
    settings = {"device": "cuda", "ckpt_freq": 2, "num_ckpt_keep": None}
    train(demo, tmp_path / "a", mode, **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "checkpoint_000004")
    train(demo, tmp_path / "b", mode, resume="auto", **settings)
    one, other = (saved_weights(tmp_path / run, 4) for run in ("a", "b"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name].float(), one[name].float(), rtol=1e-5, atol=1e-6)
