"""A frozen base in int8: what is rounded and how, that training on it is training, and what is refused."""

import importlib.util
import shutil
from dataclasses import replace

import pytest
import torch
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file, save_file
from torch import nn

import memory_measure
from conftest import make_codes, make_tiny_lm
from finetune.args import ParallelArgs, TrainArgs
from finetune.base_model.int8_linear import Int8Linear, quantised_parameters
from finetune.base_model.locate import find_model_files
from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model, warm_start
from finetune.config_io import build_args
from finetune.errors import CheckpointError, ConfigError
from finetune.training.plan import advice
from finetune.training.plan.activations import StepPeak
from finetune.training.plan.gpu_memory import estimate_memory
from finetune.training.plan.summary import model_summary
from finetune.training.run import run_training
from finetune.wrapped_model import _quantised, autocast, build_meta_model, build_model, prepare_model
from run_helpers import (
    MODES,
    command_line,
    final_folder,
    run_args,
    run_values,
    saved_weights,
    write_yaml,
)

CPU = torch.device("cpu")


def make_args(mode="lora_ttt", **overrides):
    values = MODES[mode] | {"param_dtype": "float32", "quantise": "int8", "gradient_checkpointing": False}
    return build_args(TrainArgs, values | overrides)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=False, dtype=torch.float32)
    linear.weight.data[3] = 0
    linear.weight.data[5] *= 1000
    return linear, Int8Linear.from_linear(linear)


def rounded_weight(layer):
    return layer.weight.double() * layer.weight_scb.double()[:, None] / 127


def test_each_row_is_rounded_to_a_127th_of_its_largest_weight(layer):
    linear, rounded = layer
    largest = linear.weight.detach().abs().amax(1)
    assert torch.equal(rounded.weight_scb, largest) and rounded.weight.dtype == torch.int8
    error = (rounded_weight(rounded) - linear.weight.detach()).abs()
    assert (error <= largest[:, None] / 127 * 0.5001).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_it_computes_with_the_rounded_weight_and_so_does_its_gradient(layer, dtype, tolerance):
    rounded = layer[1]
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 40, dtype=dtype)
    out = rounded(x)
    out.backward(grad)
    weight = rounded_weight(rounded)
    for found, expected in ((out, x.double() @ weight.T), (x.grad, grad.double() @ weight)):
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_it_follows_autocast_and_keeps_neither_input_nor_weight_of_floats(layer):
    kept = []
    x = torch.randn(3, 24, requires_grad=True)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t),
    ):
        assert layer[1](x).dtype == torch.bfloat16
    assert {id(tensor) for tensor in kept} == {id(parameter) for parameter in layer[1].parameters()}


@pytest.mark.parametrize("mode", ["lora", "ttt", "lora_ttt"])
def test_what_is_frozen_in_the_transformers_is_rounded_and_nothing_else(mode):
    args = make_args(mode)
    before = prepare_model(make_tiny_lm(dtype=torch.float32), args)
    trained = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    linear = {name for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    after = _quantised(before, args)
    rounded = {name for name, module in after.named_modules() if isinstance(module, Int8Linear)}
    left = {name for name in linear - rounded if f"{name}.weight" not in trained}
    assert {name.removesuffix(".frozen_W") for name in left} == {
        "text_linear",
        *(f"linears.{index}" for index in range(after.dep_q)),
    }
    assert rounded and rounded <= linear
    parameters = dict(after.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == trained
    assert all(parameters[name].dtype == torch.float32 for name in trained)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_losses_are_near_those_of_the_unrounded_model_and_gradients_reach_what_trains(param_dtype):
    args = make_args(param_dtype=param_dtype, gradient_checkpointing=True)
    lm = make_tiny_lm(dtype=getattr(torch, param_dtype))
    model = prepare_model(lm, args)
    codes = make_codes(model, 1, 16)

    def logits():
        with autocast(args, CPU):
            return model(codes).text_logits.float()

    plain = logits().detach()
    _quantised(model, args)
    rounded = logits()
    known = plain.isfinite() & rounded.isfinite()
    error = (rounded - plain)[known].square().mean().sqrt() / plain[known].std()
    assert 0 < error < 0.05
    rounded[known].square().sum().backward()
    adapted = [module for module in model.transformer.modules() if isinstance(module, LoRALinear)]
    assert adapted and all(module.lora_B.weight.grad.abs().sum() > 0 for module in adapted)
    assert all(parameter.grad is None for parameter in quantised_parameters(model))


def test_the_summary_counts_parameters_as_without_and_says_how_many_are_rounded():
    args = make_args()
    plain = model_summary(prepare_model(make_tiny_lm(dtype=torch.float32), args), args)
    lines = model_summary(_quantised(prepare_model(make_tiny_lm(dtype=torch.float32), args), args), args)
    assert lines.pop(1) == "Rounded to int8: 104,448 parameters of the base model (84%)."
    assert lines == plain


def test_the_estimate_has_a_byte_for_each_rounded_weight():
    args, tiny = make_args("lora", param_dtype="bfloat16"), memory_measure.TINY
    plain, estimate = (
        estimate_memory(replace(args, quantise=side), tiny, num_gpus=1, step=StepPeak(0, 0))
        for side in (None, "int8")
    )
    rounded = quantised_parameters(build_meta_model(args, tiny))
    saved = sum(p.numel() if p.ndim == 2 else -4 * p.numel() for p in rounded)
    assert plain.weights - estimate.weights == saved > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "ttt"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_is_the_measured_peak(mode, checkpointing):
    args = make_args(mode, param_dtype="bfloat16", duration_sec=8.0, gradient_checkpointing=checkpointing)
    args = replace(args, ttt=replace(args.ttt, persistent_states=False))
    estimate = estimate_memory(args, memory_measure.TINY, num_gpus=1)
    assert estimate.peak == pytest.approx(memory_measure.measured_peak(args, memory_measure.TINY), rel=0.03)


def test_advice_offers_it_on_one_gpu_and_takes_it_back_for_several():
    args = make_args(quantise=None, gradient_checkpointing=True)
    first, second, *_ = advice._changes(args, 1)
    assert (first.text, first.args.quantise, first.num_gpus) == ("quantise: int8", "int8", 1)
    assert second.text == "or instead of that 2 GPUs with parallel.strategy: fsdp"
    assert second.args.quantise is None
    first, *_ = advice._changes(replace(args, quantise="int8"), 1)
    assert first.text == "2 GPUs with parallel.strategy: fsdp and without quantise"
    assert first.args.quantise is None


REFUSED = {
    "full": ("full", {}, "full_finetuning: true trains the weights that it rounds; set lora.enable instead"),
    "merged": (
        "lora",
        {"save_adapters": False},
        "save_adapters: false would merge the adapters",
    ),
    "samples": ("ttt", {"sample_freq": 5}, "sample_freq needs lora.enable: Moshi's code streams no other"),
    "spoken": ("ttt", {"eval": {"spoken": {"data": "x"}}}, "eval.spoken.data needs lora.enable"),
    "long": ("ttt", {"eval": {"long_context": {"data": "x"}}}, "eval.long_context.data needs lora.enable"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(case):
    mode, overrides, line = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        make_args(mode, **overrides)
    assert str(error.value).startswith(f"quantise: int8 is not possible, {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("strategy", "num_gpus"), [("fsdp", 1), ("ddp", 2), ("auto", 2)])
def test_several_processes_are_one_line(strategy, num_gpus):
    args = replace(make_args(), parallel=ParallelArgs(strategy=strategy))
    with pytest.raises(ConfigError, match=r"^quantise: int8 is for one process, not for parallel\.strategy"):
        estimate_memory(args, memory_measure.TINY, num_gpus=num_gpus)


def test_without_bitsandbytes_it_is_one_line_before_anything_is_loaded(tiny_base, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("finetune.wrapped_model.load_base", pytest.fail)
    args = make_args(moshi_paths={"hf_repo_id": str(tiny_base)})
    with pytest.raises(ConfigError, match=r"^quantise: int8 needs bitsandbytes; pip install 'moshi"):
        build_model(args, None, device=CPU)


def test_a_warm_start_that_would_overwrite_rounded_weights_is_one_line(untrained_run, tiny_base, tmp_path):
    shutil.copytree(final_folder(untrained_run("lora")), tmp_path / "start")
    path = tmp_path / "start" / "lora.safetensors"
    name = "transformer.layers.0.self_attn.in_projs.0.weight"
    base = load_file(tiny_base / "model.safetensors")
    source = next(key for key in base if key.startswith("transformer.layers.0.self_attn.in_proj"))
    save_file(load_file(path) | {name: base[source].float()}, path)
    args = make_args("lora", moshi_paths={"hf_repo_id": str(tiny_base)})
    model = build_model(args, find_model_files(args.moshi_paths), device=CPU)
    with pytest.raises(CheckpointError, match=f"holds {name}, a base weight that quantise rounds; leave"):
        warm_start(model, tmp_path / "start", args)


def test_a_run_samples_resumes_to_the_last_bit_and_leaves_adapters_of_the_unrounded_base(demo, tmp_path):
    settings = {"quantise": "int8", "duration_sec": 1.6, "batch_size": 1, "max_steps": 2, "ckpt_freq": 1}
    settings |= {"sample_freq": 2, "sample_duration_sec": 0.4, "param_dtype": "bfloat16"}
    run_training(run_args(demo, tmp_path / "run", "lora_ttt", **settings))
    assert (tmp_path / "run" / "samples" / "step_2.wav").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(list_checkpoints(tmp_path / "again" / "checkpoints")[-1])
    run_training(run_args(demo, tmp_path / "again", "lora_ttt", **settings, resume="auto"))
    first, second = saved_weights(tmp_path / "run", 2), saved_weights(tmp_path / "again", 2)
    assert first.keys() == second.keys() and not any("frozen_W" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = load_checkpoint_model(tmp_path / "again")
    assert not quantised_parameters(model)


def test_a_dry_run_for_several_gpus_is_one_line(demo, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / "c.yaml", run_values(demo, tmp_path / "run", "lora", quantise="int8"))
    assert command_line(monkeypatch, "--config", path, "--dry-run", "--gpus", "2") == 2
    out = capsys.readouterr()
    assert "Rounded to int8: " in out.out and "quantise: int8 is for one process" in out.err
