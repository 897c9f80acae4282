"""The memory estimate against the allocator's own account of real training steps."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from moshi.models import loaders

import memory_measure
from finetune.args import ParallelArgs, TrainArgs
from finetune.config_io import build_args
from finetune.errors import ConfigError
from finetune.training.command import parse_train_command
from finetune.training.plan.activations import StepPeak
from finetune.training.plan.advice import memory_lines
from finetune.training.plan.fake_step import layer_kinds, reduced
from finetune.training.plan.gpu_memory import MemoryEstimate, estimate_memory
from finetune.wrapped_model import build_meta_model
from memory_measure import TINY, measured_peak
from project_root import ROOT
from run_helpers import MODES, TTT, command_line, run_values, write_yaml

STEP = StepPeak(activations=1000, with_gradients=1200)


def make_args(mode: str, **overrides) -> TrainArgs:
    values = MODES[mode] | {"param_dtype": "float32", "duration_sec": 8.0, "batch_size": 2} | overrides
    if "ttt" in values:
        # Real steps start every chunk at W0, so nothing is carried.
        values["ttt"] = values["ttt"] | {"persistent_states": False}
    return build_args(TrainArgs, values)


CASES = list(product(["full", "lora", "lora_ttt", "ttt"], ["float32", "bfloat16"], [True, False]))
QUICK = [("full", "float32", False), ("lora", "bfloat16", False), ("ttt", "float32", True)]


@pytest.mark.parametrize(("mode", "param_dtype", "checkpointing"), QUICK)
def test_estimate_of_a_tiny_model_is_the_measured_peak(mode, param_dtype, checkpointing):
    args = make_args(mode, param_dtype=param_dtype, gradient_checkpointing=checkpointing)
    estimate = estimate_memory(args, TINY, num_gpus=1)
    assert estimate.peak == pytest.approx(measured_peak(args, TINY), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "param_dtype", "checkpointing"), [c for c in CASES if c not in QUICK])
def test_estimate_of_a_tiny_model_in_all_other_modes(mode, param_dtype, checkpointing):
    args = make_args(mode, param_dtype=param_dtype, gradient_checkpointing=checkpointing)
    estimate = estimate_memory(args, TINY, num_gpus=1)
    assert estimate.peak == pytest.approx(measured_peak(args, TINY), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full_ttt", "lora_ttt"])
def test_later_micro_batches_find_gradients(mode):
    args = make_args(mode, param_dtype="bfloat16", num_microbatches=2, batch_size=1)
    estimate = estimate_memory(args, TINY, num_gpus=1)
    assert estimate.peak == pytest.approx(measured_peak(args, TINY), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora_ttt", "ttt"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_estimate_of_layers_of_moshi_7b_is_the_measured_peak(mode, checkpointing):
    # Two layers with the true shapes, and a small vocabulary, so that the layers and activations count.
    lm_kwargs = loaders._lm_kwargs | {"num_layers": 2, "depformer_num_layers": 1, "text_card": 2048}
    args = make_args(
        mode,
        ttt=TTT | {"layers": "1"},
        gradient_checkpointing=checkpointing,
        duration_sec=20.48,  # 256 frames
        batch_size=1,
    )
    estimate = estimate_memory(args, lm_kwargs, num_gpus=1)
    measured = measured_peak(args, lm_kwargs)
    print(f"{mode}, checkpointing {checkpointing}: {estimate.peak / 1e9:.3f} of {measured / 1e9:.3f} GB")
    assert estimate.peak == pytest.approx(measured, rel=0.15)


def test_every_kind_of_layer_is_traced_once():
    args = make_args("ttt", ttt=TTT | {"layers": "2,3"})
    kinds = layer_kinds(build_meta_model(args, TINY | {"num_layers": 6}))
    small, small_kwargs, chosen = reduced(args, TINY, kinds)
    assert small.ttt.layers == [2, 3] and small_kwargs["num_layers"] == 5
    assert [(kind.hybrid, kind.input_grad) for kind in chosen] == [
        (False, False),
        (False, False),
        (True, False),
        (True, True),
        (False, True),
    ]


def test_shards_and_whole_models():
    def on(num_gpus: int, **parallel) -> MemoryEstimate:
        args = replace(make_args("lora"), parallel=ParallelArgs(**parallel))
        return estimate_memory(args, TINY, num_gpus=num_gpus, step=STEP)

    one, ddp, fsdp = on(1), on(8, strategy="ddp"), on(8)
    assert one == ddp and one.sharding == 0
    assert fsdp.weights == pytest.approx(one.weights / 8, abs=1) and fsdp.sharding > 0
    assert on(8, replicas=2).optimizer == pytest.approx(one.optimizer / 4, abs=1)
    assert one.optimizer == 2 * one.gradients
    with pytest.raises(ConfigError, match="none is for one process"):
        on(8, strategy="none")
    with pytest.raises(ConfigError, match="replicas: 3 does not divide the number of processes, 8"):
        on(8, replicas=3)


def test_carried_memory_is_counted_per_row():
    args = build_args(TrainArgs, {"ttt": TTT, "batch_size": 2, "num_microbatches": 3})
    memory = estimate_memory(args, TINY, num_gpus=1, step=STEP).ttt_memory
    fast = 4 * (32 * 128 + 128 + 128 * 32 + 32)  # heads x inner MLP of a tiny layer
    pending = 16 * (2 * 128 + 4)
    # Rows before and after a step of three micro-batches of two, those read, and those written.
    assert memory == 4 * 2 * (fast + pending) * (2 * 6 + 2 + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run", "--gpus", "0"], "--gpus: '0' is not a whole number from 1"),
        (["--dry-run", "--gpus", "-1"], "--gpus: '-1'"),
        (["--dry-run", "--gpus", "1.5"], "--gpus: '1.5'"),
        (["--dry-run", "--gpus", "1" * 30], "--gpus: "),
        (["--dry-run", "--gpu-memory-gb", "nan"], "--gpu-memory-gb: 'nan' is not a number"),
        (["--dry-run", "--gpu-memory-gb", "inf"], "--gpu-memory-gb: 'inf'"),
        (["--dry-run", "--gpu-memory-gb", "-3"], "--gpu-memory-gb: '-3'"),
        (["--gpus", "8"], "--gpus: 8 belongs to a dry run"),
        (["--gpu-memory-gb", "80"], "--gpu-memory-gb: 80 belongs to a dry run"),
    ],
)
def test_impossible_gpus_are_one_line(options, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("lora: {enable: true}\n")
    with pytest.raises(ConfigError) as error:
        parse_train_command([str(path), *options])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_dry_run_of_moshi_7b_fits_eight_gpus(monkeypatch, capsys):
    path = ROOT / "example" / "moshi_7B_ttt.yaml"
    assert command_line(monkeypatch, path, "--dry-run", "--gpus", "8", "--gpu-memory-gb", "24") == 0
    assert re.search(r"Fits in 24 GB by this estimate: 1\d\.\d GB", capsys.readouterr().out)


@pytest.mark.slow
def test_a_dry_run_says_what_would_make_it_fit(demo, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run"))
    assert command_line(monkeypatch, path, "--dry-run", "--gpu-memory-gb", "0.03") == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT in 0.03 GB" in text
    assert re.search(r"  gradient_checkpointing: true: [\d.]+ GB, fits\n", text)


@pytest.mark.slow
def test_more_gpus_are_advice_without_another_trace(monkeypatch):
    args = make_args("lora", gradient_checkpointing=True, batch_size=1)
    weights = sum(p.numel() * p.element_size() for p in build_meta_model(args, TINY).parameters())
    lines, fits = memory_lines(args, TINY, num_gpus=1, gpu_memory_gb=weights / 1e9)
    assert not fits and any("2 GPUs with parallel.strategy: fsdp" in line for line in lines)


def test_the_measure_sees_the_allocator():
    assert memory_measure.measured_peak(make_args("lora"), TINY) > torch.finfo(torch.float32).bits
