"""Schedules of the outer rates: their shape, the peak of each group, and that the step alone decides."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from conftest import make_tiny_lm
from finetune.args import LoraArgs, OptimArgs, TrainArgs, TTTArgs
from finetune.config_io import build_args
from finetune.diagnose.rules import Facts
from finetune.errors import ConfigError
from finetune.training.optim import build_optimizer, build_scheduler, current_rates
from finetune.training.plan.summary import model_summary
from finetune.wrapped_model import prepare_model

SHAPES = [
    {},
    {"pct_start": 0.3},
    {"warmup_steps": 0},
    {"warmup_steps": 1},
    {"warmup_steps": 7},
    {"schedule": "cosine"},
    {"schedule": "cosine", "warmup_steps": 0},
    {"schedule": "cosine", "warmup_steps": 7},
    {"schedule": "wsd", "pct_decay": 0.35},
    {"schedule": "wsd", "warmup_steps": 0},
    {"schedule": "wsd", "pct_start": 0.25, "pct_decay": 0.75},
]


class TwoGroups(nn.Module):
    """Two parameters of two groups."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.gating_alpha = nn.Parameter(torch.zeros(2))


def make_args(max_steps=20, **optim):
    ttt = TTTArgs(enable=True, layers="1,3", alpha_lr_multiplier=50)
    return TrainArgs(ttt=ttt, optim=OptimArgs(lr=1e-3, **optim), max_steps=max_steps)


def rates(args, *, stop_after=None, group="base"):
    """Of each step; with `stop_after` the steps after it are those of a run that resumed there."""
    optimizer = build_optimizer(TwoGroups(), args)
    scheduler = build_scheduler(optimizer, args)
    seen = []
    for step in range(args.max_steps):
        if step == stop_after:
            optimizer = build_optimizer(TwoGroups(), args)
            build_scheduler(optimizer, args)
            scheduler = build_scheduler(optimizer, args, step=step)
        seen.append(current_rates(optimizer)[f"lr_{group}"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_default_is_onecycle_to_the_last_bit():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=1e-3)
    stock = OneCycleLR(optimizer, max_lr=[1e-3], total_steps=50, pct_start=0.05, cycle_momentum=False)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stock.step()
    assert rates(make_args(50)) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_each_group_reaches_its_peak_where_the_warm_up_ends_and_no_step_rests(shape):
    args = make_args(**shape)
    base, gates = rates(args), rates(args, group="ttt_alpha")
    assert max(base) == pytest.approx(1e-3, rel=1e-4) and min(base) > 0
    assert gates == pytest.approx([50 * rate for rate in base])
    peak = max(0, round(args.optim.num_warmup_steps(20)) - 1)
    assert base[peak] == pytest.approx(max(base), rel=1e-4)
    assert base[: peak + 1] == sorted(base[: peak + 1])
    assert base[peak:] == sorted(base[peak:], reverse=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stop_after", [1, 6, 7, 13, 19])
def test_a_run_that_resumes_has_the_rates_that_it_would_have_had(shape, stop_after):
    args = make_args(**shape)
    assert rates(args, stop_after=stop_after) == pytest.approx(rates(args), rel=1e-12)


def test_cosine_is_half_a_cosine_after_a_straight_warm_up():
    seen = rates(make_args(schedule="cosine", warmup_steps=4))
    assert seen[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    fall = [0.5e-3 * (1 + math.cos(math.pi * step / 17)) for step in range(17)]
    assert seen[3:] == pytest.approx(fall)


def test_wsd_stays_at_the_peak_and_falls_in_a_straight_line():
    seen = rates(make_args(schedule="wsd", warmup_steps=4, pct_decay=0.25))
    assert seen[3:16] == [1e-3] * 13
    assert seen[15:] == pytest.approx([1e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3])


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "wsd"])
def test_a_share_and_a_number_of_steps_are_the_same_warm_up(schedule):
    by_share, by_steps = ({"pct_start": 0.25}, {"warmup_steps": 5})
    assert rates(make_args(schedule=schedule, **by_share)) == rates(make_args(schedule=schedule, **by_steps))


def test_the_rules_of_health_know_the_warm_up():
    assert Facts.of(make_args(warmup_steps=7)).warmup_steps == 7
    assert Facts.of(make_args()).warmup_steps == 1


@pytest.mark.parametrize(
    ("optim", "line"),
    [
        ({}, "Steps: 20, of which 1 warm up (5%); batch"),
        (
            {"schedule": "cosine", "warmup_steps": 5},
            "which 5 warm up (25%), schedule cosine; batch",
        ),
        ({"schedule": "wsd"}, "of which 1 warm up (5%) and the last 4 decay (20%), schedule wsd; batch"),
    ],
)
def test_the_summary_says_the_schedule(optim, line):
    args = dataclasses.replace(make_args(**optim), lora=LoraArgs(enable=True, rank=2), param_dtype="float32")
    assert line in model_summary(prepare_model(make_tiny_lm(dtype=torch.float32), args), args)[-1]


@pytest.mark.parametrize(
    ("optim", "line"),
    [
        (
            {"schedule": "linear"},
            "optim.schedule: 'linear' is not allowed, expected onecycle or cosine",
        ),
        ({"warmup_steps": -1}, "optim.warmup_steps: -1 is not allowed"),
        ({"warmup_steps": 2, "pct_start": 0.1}, "optim.warmup_steps: 2 and pct_start: 0.1 both say"),
        ({"warmup_steps": 20}, "optim.warmup_steps: 20 warm up of 20 steps in all (max_steps); lower it"),
        ({"pct_decay": 0.1}, "optim.pct_decay: 0.1 belongs to schedule wsd, not onecycle"),
        (
            {"schedule": "wsd", "pct_start": 0.3, "pct_decay": 0.8},
            "optim.pct_decay: 0.8 of 20 steps (max_steps) and a warm-up of 6 are more than there are",
        ),
    ],
)
def test_what_cannot_be_is_one_line(optim, line):
    with pytest.raises(ConfigError) as error:
        build_args(TrainArgs, {"full_finetuning": True, "max_steps": 20, "optim": optim})
    assert line in str(error.value) and "\n" not in str(error.value)
