"""The recall experiments in a short form: tasks, arms, runs that resume, tables."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.models import num_parameters
from experiments.recall.__main__ import main
from experiments.recall.arms import ARMS, Settings, build_arm
from experiments.recall.report import (
    ablation_table,
    arms_table,
    initialisation_table,
    plot_arms,
    read_runs,
    recovered,
    write_report,
)
from experiments.recall.runs import Run, run_arm
from experiments.recall.speech import SpeechTask
from experiments.recall.studies import ABLATIONS, EXPERIMENTS, Plan, plans_of
from experiments.recall.tasks import PatternTask
from experiments.recall.training import Schedule, train
from finetune.commands import run_command
from finetune.errors import UserError
from finetune.ttt_integration import attention_windows
from moshi_ttt.hybrid_model import ttt_layers, ttt_mode

TASK = PatternTask(num_symbols=6, period=8, num_tokens=24, window=2, dim=16, num_heads=2)
SETTINGS = Settings(ttt={"layers": "1,2", "initial_gating_alpha": 1.0, "mini_batch_size": 4, "base_lr": 2.0})
SHORT = Schedule(num_steps=4, batch_size=4, eval_every=2, num_eval=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_pattern_repeats_and_the_scored_tokens_are_those_of_the_repetition():
    codes = TASK.batch(3, generator())
    assert codes.shape == (3, 1, 24)
    assert torch.equal(codes[:, :, 8:16], codes[:, :, :8])
    assert torch.equal(codes[:, :, 16:], codes[:, :, :8])
    assert TASK.scored.tolist() == [False] * 8 + [True] * 16
    assert len({tuple(row) for row in TASK.batch(50, generator())[:, 0].tolist()}) == 50


def test_attention_of_the_short_arms_does_not_reach_one_period_back():
    for experiment in EXPERIMENTS:
        for plan in plans_of(experiment, demo=None):
            if plan.arm != "full":
                assert plan.task.num_layers * (plan.task.window - 1) < plan.task.period - 1, plan.label


@torch.no_grad()
def test_a_short_window_sees_nothing_of_the_period_before_and_ttt_does():
    # The logits at a token of the second period, when a token of the first one is another.
    for arm in ("window", "window_wider", "window_ttt_frozen", "window_ttt", "full"):
        lm = build_arm(arm, TASK, SETTINGS, seed=0).eval()
        codes = TASK.batch(1, generator())
        changed = codes.clone()
        changed[0, 0, 3] = (codes[0, 0, 3] + 1) % 6
        a, b = (TASK.losses(lm, x)[0, 16:] for x in (codes, changed))
        assert torch.equal(a, b) == (arm not in ("window_ttt", "full")), arm


def test_arms_have_the_window_the_memory_and_the_size_that_their_name_says():
    models = {arm: build_arm(arm, TASK, SETTINGS, seed=0) for arm in ARMS}
    assert {arm: attention_windows(lm)[0] for arm, lm in models.items()} == {
        "window": 2, "window_ttt": 2, "window_ttt_frozen": 2, "window_wider": 2, "full": None
    }  # fmt: skip
    assert [arm for arm, lm in models.items() if ttt_layers(lm)] == ["window_ttt", "window_ttt_frozen"]
    assert ttt_mode(models["window_ttt"]) == "on" and ttt_mode(models["window_ttt_frozen"]) == "frozen"
    sizes = {arm: num_parameters(lm) for arm, lm in models.items()}
    assert sizes["window"] == sizes["full"]
    assert sizes["window_ttt"] == sizes["window_ttt_frozen"]
    assert sizes["window_ttt"] <= sizes["window_wider"] <= 1.02 * sizes["window_ttt"]


def test_arms_of_one_seed_start_from_the_same_transformer():
    window, ttt, full = (
        dict(build_arm(arm, TASK, SETTINGS, seed=3).named_parameters())
        for arm in ("window", "window_ttt", "full")
    )
    assert all(torch.equal(parameter, ttt[name]) for name, parameter in window.items())
    assert all(torch.equal(parameter, full[name]) for name, parameter in window.items())


def test_the_scale_of_the_first_inner_layer_is_what_the_study_says():
    settings = Settings(ttt=SETTINGS.ttt, first_layer_std=0.1)
    for layer in ttt_layers(build_arm("window_ttt", TASK, settings, seed=0)).values():
        assert layer.weights[0].std().item() == pytest.approx(0.1, rel=0.1)


def test_training_lowers_the_loss_and_evaluates_on_the_same_sequences():
    schedule = Schedule(num_steps=40, batch_size=8, eval_every=20, num_eval=32)
    points = list(train(build_arm("full", TASK, SETTINGS, seed=0), TASK, schedule, seed=0))
    assert [point.step for point in points] == [20, 40]
    assert points[-1].loss < points[0].loss
    again = list(train(build_arm("full", TASK, SETTINGS, seed=0), TASK, schedule, seed=0))
    assert [point.loss for point in again] == [point.loss for point in points]


def test_a_run_is_made_once(tmp_path, monkeypatch):
    plan = Plan("window_ttt", "window_ttt", TASK, SETTINGS)
    first = run_arm(tmp_path, plan, SHORT, seed=1)
    assert first.steps == [2, 4] and first.problem is None and set(first.gates) == {"1", "2"}
    monkeypatch.setattr("experiments.recall.runs.train", None)
    assert run_arm(tmp_path, plan, SHORT, seed=1) == first


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    run_arm(tmp_path, Plan("window", "window", TASK), SHORT, seed=1)
    with pytest.raises(UserError, match="is a run with other settings"):
        run_arm(tmp_path, Plan("window", "window", TASK), Schedule(num_steps=5), seed=1)


def test_a_run_that_is_out_of_time_says_so(tmp_path):
    schedule = Schedule(num_steps=50, batch_size=4, num_eval=8, budget_min=0.0)
    run = run_arm(tmp_path, Plan("window", "window", TASK), schedule, seed=1)
    assert run.problem == "out of time after 1 of 50 steps" and len(run.losses) == 1
    assert "window seed 1: out of time after 1 of 50 steps" in arms_table(read_runs(tmp_path))
    plan = Plan("window", "window", TASK)
    assert run_arm(tmp_path, plan, schedule, seed=1) == run
    again = run_arm(tmp_path, plan, replace(schedule, budget_min=5.0), seed=1)
    assert again.problem is None and again.steps[-1] == 50


def test_a_run_that_diverges_says_so_and_the_report_goes_on(tmp_path):
    class Diverging(PatternTask):
        def losses(self, lm, codes):
            return super().losses(lm, codes) * torch.nan

    run = run_arm(tmp_path, Plan("window", "window", Diverging(**vars(TASK))), SHORT, seed=1)
    assert run.problem == "loss nan at step 1" and run.losses == []
    run_arm(tmp_path, Plan("full", "full", TASK), SHORT, seed=1)
    assert f"window seed 1: {run.problem}" in arms_table(read_runs(tmp_path))
    write_report(tmp_path, "pattern")


def fake_run(loss, seed):
    return Run({"seed": seed}, [10], [loss], [0.1], [loss], 100, {}, None)


def test_the_share_of_the_gap_is_measured_between_short_window_and_full_attention():
    runs = {
        "window": [fake_run(4.0, 1), fake_run(4.2, 2)],
        "full": [fake_run(0.1, 1), fake_run(0.1, 2)],
        "window_ttt": [fake_run(0.5, 1), fake_run(1.1, 2)],
    }
    assert recovered(runs, "window_ttt") == pytest.approx([0.9, 0.75])
    assert "0.8000 (0.5000, 1.1000) | 82.5 % (90 %, 75 %)" in arms_table(runs)


def test_a_share_of_no_gap_is_no_number():
    runs = {"window": [fake_run(4.0, 1)], "full": [fake_run(4.0, 1)], "window_ttt": [fake_run(3.9, 1)]}
    assert recovered(runs, "window_ttt") == []
    assert "| 3.9000 (3.9000) | - |" in arms_table(runs)


def test_runs_that_ended_early_or_diverged_at_once_are_reported_beside_the_others(tmp_path):
    diverged = Run({"seed": 2}, [], [], [], [], 100, {}, "loss nan at step 1")
    short = Run({"seed": 3}, [10], [3.0], [0.1], [3.0], 100, {}, "out of time after 10 of 20 steps")
    full = Run({"seed": 1}, [10, 20], [3.0, 1.0], [0.1, 0.2], [1.0], 100, {}, None)
    runs = {"window": [fake_run(4.0, 1), diverged], "full": [full, short], "window_ttt": [diverged]}
    table = arms_table(runs)
    assert "| short window | 100 | 4.0000 (4.0000) |" in table and "2.0000 (1.0000, 3.0000)" in table
    assert "| short window + TTT | 100 | - | - | 0 | - |" in table
    assert "- window seed 2: loss nan at step 1" in table
    assert plot_arms(runs, tmp_path / "arms.png", unit="token").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"steps": 1}'])
def test_a_damaged_file_of_a_run_says_what_to_do(tmp_path, content):
    (tmp_path / "window.seed1.json").write_text(content)
    for read in (
        lambda: read_runs(tmp_path),
        lambda: run_arm(tmp_path, Plan("window", "window", TASK), SHORT, seed=1),
    ):
        with pytest.raises(UserError, match=r"window\.seed1\.json: is damaged or no run; remove it"):
            read()


def test_a_folder_that_cannot_be_written_is_noticed_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.recall.runs.train", None)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="file"):
        run_arm(tmp_path / "file" / "below", Plan("window", "window", TASK), SHORT, seed=1)


def test_the_table_of_initialisations_leaves_out_what_is_not_there():
    runs = {"d16.window": [fake_run(4.0, 1)], "d16.full": [fake_run(0.0, 1)], "d16.std1": [fake_run(1.0, 1)]}
    assert "| N(0, 1²) = unit_variance | 75 % (75 %) | - | - |" in initialisation_table(runs)


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["recall", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        run_command(main)
    return status.value.code


def test_the_command_trains_the_arms_and_writes_a_report(tmp_path, monkeypatch):
    options = ("--out", tmp_path, "--seeds", 1, "--steps", 2, "--batch-size", 2)
    assert command(monkeypatch, "pattern", *options) == 0
    report = (tmp_path / "pattern" / "report.md").read_text()
    assert all(meaning in report for meaning in ARMS.values())
    assert (tmp_path / "pattern" / "arms.png").stat().st_size > 10_000
    assert len(list((tmp_path / "pattern").glob("*.json"))) == len(ARMS)
    labels = ("d16.window", "d16.full", "d16.std1")
    assert command(monkeypatch, "init", *options, "--only", *labels) == 0
    assert "unit_variance" in (tmp_path / "init" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pattern", "--only", "wide"), "--only: there is no run 'wide', choose from window,"),
        (
            ("speech", "--demo", "nowhere"),
            "nowhere: no demo recordings here; make them with",
        ),
        (("pattern", "--steps", "0"), "0 is not allowed"),
        (("pattern", "--budget-min", "nan"), "'nan' is not allowed, must be minutes above 0"),
        (("pattern", "--budget-min", "0"), "'0' is not allowed, must be minutes above 0"),
        (("colours",), "invalid choice: 'colours'"),
    ],
)
def test_wrong_inputs_end_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1] and "Traceback" not in "".join(errors)


@pytest.mark.parametrize("num_codebooks", [2, 4])
def test_a_passage_of_speech_comes_twice_and_is_learned_from_real_codes(demo, num_codebooks):
    task = SpeechTask(demo.out_dir, num_codebooks=num_codebooks, period=24, num_frames=48, window=4)
    codes = task.batch(4, generator())
    assert codes.shape == (4, 1 + num_codebooks, 48) and (codes[:, 0] == -1).all()
    assert torch.equal(codes[:, :, 24:], codes[:, :, :24])
    assert codes[:, 1:].min() >= 0
    lm = build_arm("window_ttt", task, SETTINGS, seed=0)
    losses = task.losses(lm, codes)
    assert losses.shape == (4, 48) and losses.isfinite().all()
    losses.mean().backward()
    held_out = task.batch(4, generator(), held_out=True)
    assert not torch.equal(held_out, codes)


def test_settings_of_a_run_can_be_written_and_read(tmp_path):
    run = run_arm(tmp_path, Plan("window", "window", TASK), SHORT, seed=1)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["description"] == run.description


def test_ablations_change_what_their_rows_say():
    plans = {plan.label: plan for plan in plans_of("ablation", demo=Path())}
    default = plans["as-is"]
    assert default.settings == Settings() and not default.schedule
    for label, changes in ABLATIONS.items():
        plan = plans[label]
        changed = {
            name for name, value in plan.settings.ttt.items() if default.settings.ttt.get(name) != value
        }
        changed |= plan.schedule.keys()
        changed |= {"projection_std"} if plan.settings.projection_std is not None else set()
        assert changed == changes.keys()
        step = default.settings.ttt["base_lr"] / default.settings.ttt["mini_batch_size"]
        same_step = changes.get("base_lr", 0) == step * changes.get("mini_batch_size", 0) > 0
        assert same_step or len(changed) == (label != "as-is")  # one thing, or two that keep a token's step
        assert num_parameters(build_arm(plan.arm, plan.task, plan.settings, seed=1)) > 0
    runs = {"window": [fake_run(4.0, 1)], "full": [fake_run(0.0, 1)], "base_lr-1": [fake_run(4.01, 1)]}
    assert "| `base_lr: 1.0` | 0 % (0 %) |" in ablation_table(runs, ABLATIONS)


def test_gates_of_a_faster_rate_move_further_and_stored_runs_keep_their_description(tmp_path):
    moved = []
    for multiplier in (1.0, 10.0):
        plan = Plan(
            f"gates-{multiplier:g}", "window_ttt", TASK, SETTINGS, {"alpha_lr_multiplier": multiplier}
        )
        run = run_arm(tmp_path, plan, SHORT, seed=1)
        assert ("alpha_lr_multiplier" in run.description["schedule"]) == (multiplier != 1)
        moved.append(max(abs(gate - math.tanh(1.0)) for gate in run.gates.values()))
    assert moved[1] > 3 * moved[0]


def test_arms_stay_those_of_the_stored_runs_and_can_have_a_key_shift():
    (layer, _) = ttt_layers(build_arm("window_ttt", TASK, Settings(), seed=1)).values()
    found = layer.config.key_shift, layer.config.tied_start, layer.config.base_lr_scale
    assert found == (0, False, "published")
    shifted = Settings(ttt={**Settings().ttt, "key_shift": 1})
    (layer, _) = ttt_layers(build_arm("window_ttt", TASK, shifted, seed=1)).values()
    assert layer.config.key_shift == 1


def test_a_rate_of_a_plan_goes_before_that_of_the_schedule(tmp_path):
    run = run_arm(tmp_path, Plan("window", "window", TASK, schedule={"lr": 1e-5}), SHORT, seed=1)
    assert run.description["schedule"]["lr"] == 1e-5
