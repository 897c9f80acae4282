"""The study of fine-tuning in a short form: tasks, arms, what a memory recalls, runs that resume, tables."""

import dataclasses
import json
import math

import pytest
import torch

from experiments.fine_tuning import base, training
from experiments.fine_tuning.__main__ import main
from experiments.fine_tuning.base import token_losses
from experiments.fine_tuning.report import recall_table, recalled, write_report
from experiments.fine_tuning.studies import STUDIES, Study
from experiments.fine_tuning.tasks import NUM_KEYS, NUM_SYMBOLS, PERIOD, AfterAGap, Pairs, ThreeTimes, Twice
from experiments.fine_tuning.training import recall_loss
from experiments.models import num_parameters
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
    return {plan.arm.label: plan.arm for plan in STUDIES["recall"].plans}


def test_what_is_scored_was_heard_before_and_cannot_be_seen_through_the_window():
    reach = 3 * 7  # layers times what a window of 8 sees before a token
    three = ThreeTimes().draw(4, generator())
    assert torch.equal(three.codes[:, :, PERIOD:], three.codes[:, :, :-PERIOD])
    assert three.scored.tolist() == [False] * PERIOD + [True] * 2 * PERIOD
    for filler in ("same", "other", "silence"):
        task = AfterAGap(filler, 64)
        codes, scored = task.draw(4, generator(), difficulty=20)
        assert torch.equal(codes[:, :, :PERIOD], codes[:, :, PERIOD + 20 :])
        assert scored.nonzero().flatten().tolist() == list(range(PERIOD + 22, 2 * PERIOD + 20))
        between = codes[:, :, PERIOD : PERIOD + 20]
        assert ((between >= NUM_SYMBOLS) == (filler != "same")).all()
        assert (len(between.unique()) == 1) == (filler == "silence")
        assert codes.max() < task.num_tokens_known
        gaps = {task.draw(1, generator(seed)).codes.shape[2] - 2 * PERIOD for seed in range(200)}
        assert min(gaps) == 0 and max(gaps) > 48 and max(gaps) <= 64
    assert reach < PERIOD


def test_pairs_are_asked_for_in_another_order_and_their_values_are_scored():
    codes, scored = Pairs(64).draw(3, generator(), difficulty=10)
    assert codes.shape == (3, 1, 40)
    assert scored.nonzero().flatten().tolist() == list(range(21, 40, 2))
    for row in codes[:, 0].tolist():
        given, asked = (dict(zip(part[::2], part[1::2], strict=True)) for part in (row[:20], row[20:]))
        assert given == asked and len(given) == 10 and list(given) != list(asked)
        assert max(given) < NUM_KEYS <= min(given.values())
    numbers = {Pairs(16).draw(1, generator(seed)).codes.shape[2] // 4 for seed in range(300)}
    assert min(numbers) == 4 and max(numbers) == 16


def test_patterns_of_all_lengths_come_twice():
    codes, scored = Twice(64).draw(3, generator(), difficulty=20)
    assert torch.equal(codes[:, :, :20], codes[:, :, 20:]) and codes.shape[2] == 40
    assert scored.nonzero().flatten().tolist() == list(range(22, 40))
    lengths = {Twice(64).draw(1, generator(seed)).codes.shape[2] // 2 for seed in range(300)}
    assert min(lengths) == 16 and max(lengths) > 56 and max(lengths) <= 64


def test_other_memories_are_causal_and_do_what_their_name_says(tmp_path):
    codes, _ = ThreeTimes().draw(1, generator())
    later = codes.clone()
    later[0, 0, 70] = (codes[0, 0, 70] + 1) % NUM_SYMBOLS
    losses = {}
    for plan in STUDIES["learning"].plans:
        ttt = {**plan.arm.ttt, "initial_gating_alpha": 1.0, "tied_start": False}
        arm = dataclasses.replace(plan.arm, ttt=ttt)
        lm = arm.build(NUM_SYMBOLS, bases=tmp_path, seed=1).eval()
        with torch.no_grad():
            losses[arm.label] = token_losses(lm, codes)[0]
            assert torch.equal(token_losses(lm, later)[0, :70], losses[arm.label][:70]), arm.label
        if arm.variant == "gated-delta":
            assert 8 * 16**2 <= ttt_layers(lm)[1].width ** 2 <= 9 * 16**2
    assert len({tuple(each.tolist()) for each in losses.values()}) == len(losses)


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
    assert "| window alone | 5.6 % (5.6) | 3.000 | 2 |" in table
    assert (tmp_path / "recall" / "recall.png").stat().st_size > 1000
    changed["description"]["seed"] = 2
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="with other settings"):
        _run(monkeypatch, tmp_path, "recall", *options, "window")
    path.write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        write_report(tmp_path / "recall", "recall")


def test_recalled_shares_and_tables_are_computed_from_all_seeds():
    (plan,) = [plan for plan in STUDIES["recall"].plans if plan.arm.label == "defaults"]
    arm = {"num_steps": 1000}
    same = [
        {"loss": share * math.log(24), "gates": {"1": 0.5}, "num_parameters": 7, "description": {"arm": arm}}
        for share in (0.25, 0.75)
    ]
    assert recalled(plan, same) == pytest.approx([75.0, 25.0])
    assert "| 50.0 % (75.0, 25.0) | 1.589 | 1,000 | 7 | 0.50 |" in recall_table([plan], {"defaults": same})


def test_retention_is_measured_at_every_gap(tmp_path, monkeypatch):
    plan = STUDIES["retention"].plans[0]
    short_task = dataclasses.replace(plan.task, longest=8)
    short_plan = dataclasses.replace(plan, task=short_task, difficulties=(0, 32))
    monkeypatch.setitem(STUDIES, "retention", Study([short_plan], "tokens in between"))
    assert _run(monkeypatch, tmp_path, "retention", "--seeds", "1", "--steps", "1") == 0
    runs = json.loads((tmp_path / "retention" / f"{plan.arm.label}.seed1.json").read_text())
    assert set(runs["losses"]) == {"0", "32"}
    assert "other symbols" in (tmp_path / "retention" / "report.md").read_text()


def test_an_unknown_label_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fine_tuning", "recall", "--out", str(tmp_path), "--only", "nothing"])
    with pytest.raises(SystemExit) as error:
        run_command(main)
    assert error.value.code == 2
    assert "there is no run 'nothing'" in capsys.readouterr().err
