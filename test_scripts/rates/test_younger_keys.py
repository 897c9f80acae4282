"""A run that is older than some keys is resumed without a word about those that change nothing."""

from pathlib import Path

import pytest

from finetune.args import LoraArgs, OptimArgs, TrainArgs
from finetune.checkpoint import resume_check
from finetune.checkpoint.resume_check import ResumePoint, check_configuration, global_batch
from finetune.config_io import public_values

YOUNGER = ("schedule", "warmup_steps", "pct_decay", "depformer_lr_multiplier")


@pytest.fixture
def lines(monkeypatch):
    """The lines of a resume with a configuration, of a run that did not know some keys."""
    monkeypatch.setattr(resume_check, "is_same_base", lambda *_: True)
    monkeypatch.setattr(resume_check, "check_data", lambda *_, **__: [])

    def resume(before, now):
        values = public_values(before)
        for key in YOUNGER:
            del values["optim"][key]
        for key in ("sample_conditions", "diagnostics", "max_norm"):
            del values[key]
        facts = {"args": values, "base_fingerprint": "", "data": {}, "global_batch": global_batch(before)}
        point = ResumePoint(Path("run"), 4, facts, Path("."))
        return check_configuration(point, now, data={}, eval_data=None, recordings=[], info=None)

    return resume


def make_args(**optim):
    return TrainArgs(lora=LoraArgs(enable=True), optim=OptimArgs(**optim))


def test_keys_that_it_did_not_know_are_not_changes(lines):
    assert lines(make_args(), make_args()) == []


def test_what_they_change_is_listed(lines):
    assert lines(make_args(), make_args(schedule="wsd", lr=1e-3)) == [
        "Changed since step 4: optim.lr 0.0001 -> 0.001",
        "Changed since step 4: optim.schedule 'onecycle' -> 'wsd'",
    ]
