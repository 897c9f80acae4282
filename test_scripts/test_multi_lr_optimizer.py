"""The three outer learning rates; runs by pytest and as a script of its own."""

import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")

import pytest
import torch

from conftest import make_codes, make_tiny_lm
from finetune.args import LoraArgs, OptimArgs, TrainArgs, TTTArgs
from finetune.training.optim import build_optimizer, build_scheduler, current_rates, decays
from finetune.ttt_utils import classify_ttt_parameter, get_parameter_groups, is_ttt_parameter
from finetune.wrapped_model import prepare_model

TTT = TTTArgs(enable=True, layers="1,3", mini_batch_size=4, weight_lr_multiplier=10, alpha_lr_multiplier=1000)


def make_args(*, full: bool = False, lora: bool = True, ttt: TTTArgs = TTT, **optim) -> TrainArgs:
    return TrainArgs(
        full_finetuning=full,
        lora=LoraArgs(enable=lora, rank=4),
        ttt=ttt,
        optim=OptimArgs(**({"lr": 3e-7} | optim)),
        param_dtype="float32",
        gradient_checkpointing=False,
        max_steps=100,
    )


def make_model(args: TrainArgs):
    lm = make_tiny_lm(dtype=getattr(torch, args.param_dtype))
    torch.manual_seed(1)
    return prepare_model(lm, args)


def test_parameter_classification():
    expected = {
        "transformer.layers.30.forward_ssm_gating.gating_alpha": "ttt_alpha",
        "transformer.layers.30.backward_ssm_gating.gating_alpha": "ttt_alpha",
        "transformer.layers.30.ttt_norm_weight": "ttt_weights",
        "transformer.layers.30.ttt.learnable_ttt_lr_bias": "ttt_weights",
        "transformer.layers.30.ttt.weights.0": "ttt_weights",
        "transformer.layers.30.ttt.post_norm.bias": "ttt_weights",
        "transformer.layers.30.lora_A": "base",
        "transformer.layers.30.norm1.alpha": "base",
        "transformer.layers.30.gating.linear_in.weight": "base",
        "transformer.layers.30.attttention.weight": "base",
        "embed_tokens.weight": "base",
    }
    for name, group in expected.items():
        assert classify_ttt_parameter(name) == group, name
        assert is_ttt_parameter(name) == (group != "base")


def test_every_parameter_of_the_tiny_model_is_in_the_right_group():
    model = make_model(make_args())
    for name, parameter in model.named_parameters():
        group = classify_ttt_parameter(name)
        if "gating_alpha" in name:
            assert group == "ttt_alpha"
        elif ".ttt." in name:
            assert group == "ttt_weights"
        else:
            assert group == "base"
            assert parameter.requires_grad == ("lora_" in name)


def test_optimizer_creation():
    args = make_args()
    model = make_model(args)
    optimizer = build_optimizer(model, args)
    rates = {"base": 3e-7, "ttt_weights": 3e-6, "ttt_alpha": 3e-4}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(rates[group["name"]])
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trainable)
    assert list(get_parameter_groups(model, args)) == ["base", "ttt_weights", "ttt_alpha"]


def test_a_group_may_be_empty():
    ttt_only = build_optimizer(make_model(make_args(lora=False)), make_args(lora=False))
    assert {group["name"] for group in ttt_only.param_groups} == {"ttt_weights", "ttt_alpha"}
    lora_only_args = make_args(ttt=TTTArgs())
    lora_only = build_optimizer(make_model(lora_only_args), lora_only_args)
    assert {group["name"] for group in lora_only.param_groups} == {"base"}


@pytest.mark.parametrize("max_steps", [1, 10, 20, 100])  # 20 steps: a warm-up of exactly one step
def test_each_group_has_its_own_peak_and_momenta_stay(max_steps):
    args = make_args(pct_start=0.05)
    optimizer = build_optimizer(make_model(args), args)
    scheduler = build_scheduler(optimizer, TrainArgs(ttt=TTT, optim=args.optim, max_steps=max_steps))
    seen: dict[str, list[float]] = {}
    for _ in range(max_steps):
        for name, rate in current_rates(optimizer).items():
            seen.setdefault(name, []).append(rate)
        assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()
    assert set(seen) == {"lr_base", "lr_ttt_weights", "lr_ttt_alpha"}
    base = torch.tensor(seen["lr_base"])
    assert torch.allclose(torch.tensor(seen["lr_ttt_weights"]), 10 * base)
    assert torch.allclose(torch.tensor(seen["lr_ttt_alpha"]), 1000 * base)
    if max_steps >= 20:
        assert base.max() == pytest.approx(3e-7, rel=0.01)


def test_weight_decay_spares_gates_norms_and_biases():
    model = make_model(make_args(full=True, lora=False))
    decayed = {name for name, _ in model.named_parameters() if decays(name, decay_norms_and_biases=False)}
    for name, parameter in model.named_parameters():
        role_is_spared = (
            name.endswith(("gating_alpha", "bias", "norm1.alpha", "norm2.alpha", "out_norm.alpha"))
            or ".biases." in name
            or "ttt_norm" in name
            or "post_norm" in name
            or "pre_norm" in name
        )
        assert (name in decayed) == (not role_is_spared), (name, tuple(parameter.shape))
    assert "transformer.layers.1.ttt.weights.0" in decayed
    with_norms = {name for name, _ in model.named_parameters() if decays(name, decay_norms_and_biases=True)}
    assert {name for name, _ in model.named_parameters()} - with_norms == {
        f"transformer.layers.{i}.forward_ssm_gating.gating_alpha" for i in (1, 3)
    }
    args = make_args(full=True, lora=False, weight_decay=0.1)
    for group in build_optimizer(model, args).param_groups:
        assert group["weight_decay"] in (0.0, 0.1)
        assert not (group["name"] == "ttt_alpha" and group["weight_decay"])


def _train(args: TrainArgs, num_steps: int, *, optimizer_of=build_optimizer):
    model = make_model(args)
    optimizer = optimizer_of(model, args)
    scheduler = build_scheduler(optimizer, args)
    for step in range(num_steps):
        codes = make_codes(model, 2, 12, seed=step)
        output = model(codes)
        loss = torch.nn.functional.cross_entropy(output.text_logits.flatten(0, 2), codes[:, :1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def test_multipliers_of_one_equal_one_rate_step_for_step():
    ttt = TTTArgs(enable=True, layers="1,3", mini_batch_size=4, weight_lr_multiplier=1, alpha_lr_multiplier=1)
    args = make_args(ttt=ttt, lr=1e-3)

    def one_rate(model, args):
        rule = {
            True: {"weight_decay": args.optim.weight_decay, "params": []},
            False: {"weight_decay": 0.0, "params": []},
        }
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rule[decays(name, decay_norms_and_biases=False)]["params"].append(parameter)
        rate = args.optim.lr
        return torch.optim.AdamW(list(rule.values()), lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    ours, plain = _train(args, 5), _train(args, 5, optimizer_of=one_rate)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("multiplier", "least", "most"), [(1, 0.0, 1e-4), (1000, 2e-3, 1.0)])
def test_gates_move_with_the_multiplier_and_stay_without(multiplier, least, most):
    ttt = TTTArgs(enable=True, layers="1,3", mini_batch_size=4, alpha_lr_multiplier=multiplier)
    args = make_args(ttt=ttt, lr=3e-7)
    model = _train(args, 100)
    for layer in (1, 3):
        gate = model.transformer.layers[layer].forward_ssm_gating.gating_alpha
        assert gate.dtype == torch.float32
        assert least <= (gate - 0.005).abs().mean() <= most


def test_masters_are_float32_over_a_frozen_bfloat16_base():
    args = TrainArgs(lora=LoraArgs(enable=True, rank=4), ttt=TTT)
    assert args.param_dtype == "bfloat16"
    model = make_model(args)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
