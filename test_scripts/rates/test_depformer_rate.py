"""A rate of the depth transformer inside the group `base`."""

from dataclasses import replace

import pytest
import torch

from conftest import make_codes, make_tiny_lm
from finetune.args import LoraArgs, OptimArgs, TrainArgs, TTTArgs
from finetune.checkpoint.resume_tensors import collect_state, load_state, save_state
from finetune.training.optim import build_optimizer, build_scheduler, current_rates
from finetune.training.plan.summary import model_summary
from finetune.ttt_utils import get_parameter_groups, is_depformer_parameter
from finetune.wrapped_model import prepare_model

TTT = TTTArgs(enable=True, layers="1,3", mini_batch_size=4, weight_lr_multiplier=1, alpha_lr_multiplier=10)


def make_args(multiplier=1.0, *, full=False, lora=True):
    return TrainArgs(
        full_finetuning=full,
        lora=LoraArgs(enable=lora, rank=2),
        ttt=TTT,
        optim=OptimArgs(lr=1e-3, depformer_lr_multiplier=multiplier),
        param_dtype="float32",
        gradient_checkpointing=False,
        max_steps=10,
    )


def make_model(args):
    return prepare_model(make_tiny_lm(dtype=torch.float32), args)


def train(model, optimizer, args, steps):
    scheduler = build_scheduler(optimizer, args, step=steps.start) if steps.start else None
    scheduler = scheduler or build_scheduler(optimizer, args)
    for step in steps:
        codes = make_codes(model, 1, 8, seed=step)
        output = model(codes)
        targets = codes[:, model.audio_offset : model.audio_offset + model.dep_q]
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def trained(multiplier, num_steps=2):
    args = make_args(multiplier)
    model = make_model(args)
    train(model, build_optimizer(model, args), args, range(num_steps))
    return dict(model.named_parameters())


def test_the_depth_transformer_is_all_that_makes_audio_codes_of_a_frame():
    names = [name for name, _ in make_tiny_lm(dtype=torch.float32).named_parameters()]
    own = {name.partition(".")[0] for name in names if is_depformer_parameter(name)}
    assert own == {"depformer", "depformer_in", "depformer_emb", "depformer_text_emb", "linears"}
    others = {name.partition(".")[0] for name in names if not is_depformer_parameter(name)}
    assert others == {"emb", "text_emb", "transformer", "out_norm", "text_linear"}


@pytest.mark.parametrize("full", [False, True])
def test_the_groups_keep_their_names_and_the_rate_lies_inside_base(full):
    args = make_args(0.25, full=full, lora=not full)
    model = make_model(args)
    optimizer = build_optimizer(model, args)
    build_scheduler(optimizer, args)
    assert list(get_parameter_groups(model, args)) == ["base", "ttt_weights", "ttt_alpha"]
    assert list(current_rates(optimizer)) == ["lr_base", "lr_ttt_weights", "lr_ttt_alpha"]
    assert current_rates(optimizer) == current_rates(build_with(make_args(full=full, lora=not full)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        own = group["name"] == "base" and group["multiplier"] == 0.25
        assert group["max_lr"] == (0.25e-3 if own else {"ttt_alpha": 1e-2}.get(group["name"], 1e-3))
        for parameter in group["params"]:
            assert is_depformer_parameter(names[id(parameter)]) == own or group["name"] != "base"


def build_with(args):
    optimizer = build_optimizer(make_model(args), args)
    build_scheduler(optimizer, args)
    return optimizer


def test_without_a_multiplier_the_groups_are_those_of_a_run_without_the_key():
    groups = build_with(make_args()).param_groups
    assert [(group["name"], group["weight_decay"] > 0) for group in groups] == [
        ("base", True),
        ("ttt_weights", True),
        ("ttt_weights", False),
        ("ttt_alpha", False),
    ]


def test_only_the_depth_transformer_moves_otherwise():
    plain, slower = trained(1.0, num_steps=1), trained(0.1, num_steps=1)
    moved = [name for name, parameter in plain.items() if not torch.equal(parameter, slower[name])]
    assert moved and all(is_depformer_parameter(name) for name in moved)


def test_a_run_that_resumes_goes_on_to_the_last_bit(tmp_path):
    args = make_args(0.1)
    whole = trained(0.1, num_steps=4)
    model = make_model(args)
    optimizer = build_optimizer(model, args)
    train(model, optimizer, args, range(2))
    num_moments = len(optimizer.state)
    save_state(collect_state(model, optimizer, {}), tmp_path / "state", None)
    again = make_model(args)
    optimizer = build_optimizer(again, args)
    build_scheduler(optimizer, args)
    load_state(tmp_path / "state", again, optimizer, {}, source="state")
    assert len(optimizer.state) == num_moments > 0
    train(again, optimizer, args, range(2, 4))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_the_summary_says_its_rate_and_where_it_applies_to_nothing():
    args = make_args(0.5)
    lines = model_summary(make_model(args), args)
    (line,) = [line for line in lines if "depth transformer" in line]
    assert line.startswith("    of which depth transformer: ") and line.endswith("params, lr=5.00e-04")
    ttt_only = replace(args, lora=LoraArgs())
    assert "    optim.depformer_lr_multiplier applies to nothing: the depth transformer does not train." in (
        model_summary(make_model(ttt_only), ttt_only)
    )
    plain = make_args()
    assert not any("depth transformer" in line for line in model_summary(make_model(plain), plain))
