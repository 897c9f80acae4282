"""The study of fine-tuning in a short form: tasks, arms, what a memory recalls, runs that resume, tables."""

import dataclasses
import json

import pytest
import torch

from experiments.fine_tuning import base, training
from experiments.fine_tuning.__main__ import main
from experiments.fine_tuning.arms import Arm, num_parameters
from experiments.fine_tuning.base import BaseSettings, token_losses
from experiments.fine_tuning.report import recall_table, retention_table, shares, write_report
from experiments.fine_tuning.studies import STUDIES
from experiments.fine_tuning.tasks import NUM_SYMBOLS, PERIOD, AfterAGap, ThreeTimes
from experiments.fine_tuning.training import recall_loss
from finetune.args import TTTArgs
from finetune.commands import run_command
from finetune.errors import DataError, UserError
from finetune.ttt_utils import is_ttt_parameter
from moshi_ttt.hybrid_model import ttt_layers, ttt_mode


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A base of two steps and a measure of one batch."""
    monkeypatch.setattr(base, "_NUM_STEPS", 2)
    monkeypatch.setattr(training, "_NUM_EVAL", 16)


def arms():
    return {plan.arm.label: plan.arm for plan in STUDIES["recall"]}


def test_what_is_scored_was_heard_before_and_cannot_be_seen_through_the_window():
    reach = 3 * 7  # layers times what a window of 8 sees before a token
    three = ThreeTimes().draw(4, generator())
    assert torch.equal(three.codes[:, :, PERIOD:], three.codes[:, :, :-PERIOD])
    assert three.scored.tolist() == [False] * PERIOD + [True] * 2 * PERIOD
    for filler in ("same", "other"):
        task = AfterAGap(filler, 64)
        codes, scored = task.draw(4, generator(), gap=20)
        assert torch.equal(codes[:, :, :PERIOD], codes[:, :, PERIOD + 20 :])
        assert scored.nonzero().flatten().tolist() == list(range(PERIOD + 22, 2 * PERIOD + 20))
        between = codes[:, :, PERIOD : PERIOD + 20]
        assert (between >= NUM_SYMBOLS).all() if filler == "other" else (between < NUM_SYMBOLS).all()
        assert codes.max() < task.num_tokens_known
        gaps = {task.draw(1, generator(seed)).codes.shape[2] - 2 * PERIOD for seed in range(200)}
        assert min(gaps) == 0 and max(gaps) > 48 and max(gaps) <= 64
    assert reach < PERIOD


def test_arms_are_what_their_labels_say(tmp_path):
    models = {
        label: arm.build(NUM_SYMBOLS, bases=tmp_path, seed=1)
        for label, arm in arms().items()
        if not label.endswith("-400")
    }
    with_ttt = [label for label, lm in models.items() if ttt_layers(lm)]
    assert with_ttt == [label for label in models if label not in ("full", "window", "wider")]
    assert ttt_mode(models["frozen"]) == "frozen"
    sizes = {label: num_parameters(lm) for label, lm in models.items()}
    assert sizes["defaults"] <= sizes["wider"] <= 1.02 * sizes["defaults"]
    trained = {
        label: {is_ttt_parameter(name): p.requires_grad for name, p in models[label].named_parameters()}
        for label in ("defaults", "ttt-only")
    }
    assert trained == {"defaults": {True: True, False: True}, "ttt-only": {True: True, False: False}}
    lora = {name for name, p in models["lora"].named_parameters() if p.requires_grad}
    assert any("lora_" in name for name in lora)
    assert all("lora_" in name or is_ttt_parameter(name) for name in lora)
    # Arms of a seed start from the same base, and those with TTT from the same layers.
    weights = [dict(models[label].named_parameters()) for label in ("window", "published", "one-rate")]
    name = next(name for name in weights[0] if "layers.1.self_attn" in name)
    assert torch.equal(weights[0][name], weights[1][name])
    name = "transformer.layers.1.ttt.wv.weight"
    assert torch.equal(weights[1][name], weights[2][name])


def test_the_product_is_what_is_measured():
    assert arms()["defaults"].ttt_args == TTTArgs(enable=True, layers="1,2")


def test_what_is_measured_in_a_stream_is_the_loss_of_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_EVAL_BLOCK", 13)
    for label in ("window", "defaults"):
        lm = arms()[label].build(NUM_SYMBOLS, bases=tmp_path, seed=1).eval()
        loss, by_position = recall_loss(lm, ThreeTimes())
        codes, scored = ThreeTimes().draw(16, generator(2**31))
        expected = token_losses(lm, codes).detach().mean(0)
        assert (by_position - expected).abs().max() < 1e-4
        assert abs(loss - expected[scored].mean().item()) < 1e-4


def _run(monkeypatch, folder, study, *options):
    arguments = ["fine_tuning", study, "--out", str(folder), "--bases", str(folder / "bases"), *options]
    monkeypatch.setattr("sys.argv", arguments)
    return main()


def test_runs_are_read_instead_of_made_again_and_make_a_report(tmp_path, monkeypatch):
    options = ("--seeds", "1", "--steps", "2", "--only")
    assert _run(monkeypatch, tmp_path, "recall", *options, "window", "full", "defaults") == 0
    path = tmp_path / "recall" / "window.seed1.json"
    first = path.read_text()
    changed = json.loads(first) | {"loss": 3.0}
    path.write_text(json.dumps(changed))
    assert _run(monkeypatch, tmp_path, "recall", *options, "window") == 0
    assert json.loads(path.read_text())["loss"] == 3.0
    table = (tmp_path / "recall" / "report.md").read_text()
    assert "| window alone | 0.0 % (0.0) | 3.000 | 2 |" in table
    assert (tmp_path / "recall" / "recall.png").stat().st_size > 1000
    changed["description"]["seed"] = 2
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="with other settings"):
        _run(monkeypatch, tmp_path, "recall", *options, "window")
    path.write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path / "recall", "recall")


def test_shares_and_tables_are_computed_from_all_seeds():
    def runs_of(*losses):
        arm = {"num_steps": 1000}
        return [
            {"loss": loss, "gates": {"1": 0.5}, "num_parameters": 7, "description": {"arm": arm, "seed": n}}
            for n, loss in enumerate(losses)
        ]

    runs = {"window": runs_of(3.0, 5.0), "full": runs_of(0.0), "defaults": runs_of(1.0, 2.0)}
    assert shares(runs, "defaults") == [75.0, 50.0]
    plans = [plan for plan in STUDIES["recall"] if plan.arm.label == "defaults"]
    assert "| 62.5 % (75.0, 50.0) | 1.500 | 1,000 | 7 | 0.50 |" in recall_table(plans, runs)


def test_retention_is_measured_at_every_gap(tmp_path, monkeypatch):
    plan = STUDIES["retention"][0]
    short_task = dataclasses.replace(plan.task, longest=8)
    short_plan = dataclasses.replace(plan, task=short_task, gaps=(0, 32))
    monkeypatch.setitem(STUDIES, "retention", [short_plan])
    monkeypatch.setattr("experiments.fine_tuning.report.GAPS", (0, 32))
    assert _run(monkeypatch, tmp_path, "retention", "--seeds", "1", "--steps", "1") == 0
    runs = json.loads((tmp_path / "retention" / f"{plan.arm.label}.seed1.json").read_text())
    assert set(runs["loss_by_gap"]) == {"0", "32"}
    assert "other symbols" in (tmp_path / "retention" / "report.md").read_text()


def test_an_unknown_label_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fine_tuning", "recall", "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit) as error:
        run_command(main)
    assert error.value.code == 2
    assert "there is no run 'nothing'" in capsys.readouterr().err
