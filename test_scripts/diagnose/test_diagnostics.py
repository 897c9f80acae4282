"""The health of a run: what is measured, what the rules say of it, and the diagnosis of a log."""

import json
import shutil

import pytest
import torch

from experiments.failures.cases import CASES
from experiments.failures.leak import measure_leak
from experiments.failures.runs import run_case
from finetune.args import TrainArgs
from finetune.commands import run_command
from finetune.config_io import build_args
from finetune.diagnose.command import diagnose
from finetune.diagnose.judge import Judge
from finetune.diagnose.rules import RULES, Facts, configuration_findings, configuration_remarks
from finetune.diagnose.update_probe import UpdateProbe
from finetune.training.run import run_training
from run_helpers import read_metrics, run_args

FACTS = Facts({"base": 1e-3, "ttt_weights": 1e-3, "ttt_alpha": 1e-2}, 4, False)


@pytest.fixture(scope="module")
def measured(demo, tmp_path_factory):
    """A run whose every step is measured, with gradient checkpointing and carried memory."""
    run_dir = tmp_path_factory.mktemp("measured") / "run"
    settings = {"diagnostics": {"freq": 1}, "gradient_checkpointing": True, "num_microbatches": 2}
    run_training(run_args(demo, run_dir, "full_ttt", max_steps=4, **settings))
    return run_dir


def _status(*arguments):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: diagnose([str(argument) for argument in arguments]))
    return caught.value.code


@pytest.mark.parametrize("changes", [{}, {"param_dtype": "bfloat16"}])
def test_measuring_changes_no_loss_and_no_weight(measured, demo, tmp_path, changes):
    settings = {"gradient_checkpointing": True, "num_microbatches": 2, "max_steps": 4, **changes}
    losses = []
    for freq in (0, 1):
        run_dir = tmp_path / str(freq)
        run_training(run_args(demo, run_dir, "full_ttt", diagnostics={"freq": freq}, **settings))
        losses.append([(record["loss"], record["grad_norm"]) for record in read_metrics(run_dir, "train")])
    assert losses[0] == losses[1]
    assert read_metrics(tmp_path / "0", "diagnostics") == []


def test_every_quantity_of_the_rules_is_measured_in_every_layer_and_group(measured):
    record = read_metrics(measured, "diagnostics")[-1]
    for quantity in {rule.quantity for rule in RULES} - {"update_ratio", "inner_gain"}:
        assert {f"{quantity}/layer_{index}" for index in (1, 3)} <= set(record)
    assert {f"update_ratio_{group}" for group in ("base", "ttt_weights", "ttt_alpha")} <= set(record)
    assert record["key_norm_min/layer_1"] == pytest.approx(1, abs=1e-5)
    assert record["target_norm_error/layer_3"] < 1e-5


def test_the_update_ratio_is_that_of_the_weights_before_and_after():
    layer = torch.nn.Linear(7, 5)
    layer.transformer = torch.nn.Module()
    layer.transformer.layers = []
    groups = [
        {"params": [p], "name": name} for name, p in zip(("base", "other"), layer.parameters(), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.3, fused=True)
    probe = UpdateProbe(layer)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 7)).square().sum().backward()
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer.step()
        probe.measure(optimizer)
        for name, old, new in zip(("base", "other"), before, layer.parameters(), strict=True):
            ratio = ((new - old).norm() / old.norm()).item()
            assert probe.values()[f"update_ratio_{name}"] == pytest.approx(ratio, rel=1e-3)


def test_a_violation_is_said_once_and_again_only_when_it_comes_back():
    judge, said = Judge(FACTS), []
    for step, value in enumerate([1, 9, 9, 1, 9, 9, 9, 9, 1, 9, 1, 1, 1, 9, 9, 9], 1):
        said += [(step, f.since) for f in judge.see(step, {"fast_weight_change/layer_2": value})]
    assert said == [(7, 5), (16, 14)]
    assert [(f.where, f.since, f.until) for f in judge.findings] == [
        ("layer 2", 5, 10),
        ("layer 2", 14, None),
    ]


def test_what_is_not_finite_is_said_at_once():
    (finding,) = Judge(FACTS).see(1, {"fast_weight_change/layer_2": None})
    assert "fast_weight_change is not finite" in finding.line() and "base_lr" in finding.line()


def test_a_gate_is_not_called_frozen_while_its_rate_is_small():
    judge = Judge(FACTS)
    for step in range(1, 30):
        rate = 1e-2 if 4 < step < 7 else 1e-5  # the warm-up, two measurements at the peak, the tail
        assert judge.see(step, {"gate_speed/layer_1": 1e-9, "lr_ttt_alpha": rate}) == []


def test_leaks_are_found_and_one_rate_is_remarked_in_the_configuration():
    ttt = {"enable": True, "causal": False, "alpha_lr_multiplier": 1, "weight_lr_multiplier": 1}
    unusual, usual = (
        build_args(TrainArgs, {"optim": {"lr": 6e-7}, "ttt": values}) for values in (ttt, {"enable": True})
    )
    assert [f.name for f in configuration_findings(unusual)] == ["future leaks"]
    (remark,) = configuration_remarks(unusual)
    assert remark.startswith("Note: one outer rate, all groups train at optim.lr")
    assert configuration_findings(usual) == configuration_remarks(usual) == []


def test_gates_that_train_faster_than_the_guides_table_are_remarked():
    def remarks(**ttt):
        return configuration_remarks(build_args(TrainArgs, {"ttt": {"enable": True} | ttt}))

    (remark,) = remarks()  # at the default optim.lr
    assert remark.startswith("Note: gates train at 0.1 (optim.lr 0.0001 x ttt.alpha_lr_multiplier 1000)")
    assert remarks(gating_trainable=False) == remarks(alpha_lr_multiplier=6) == []


@pytest.mark.parametrize("name", CASES)
def test_the_expected_monitor_fires_and_no_other(name, demo, tmp_path):
    result = run_case(name, CASES[name], demo, tmp_path, num_steps=16)
    assert set(result["found"]) == CASES[name].expected
    assert len(result["found"]) <= 1


def test_without_causality_the_loss_is_better_than_possible_and_worse_in_a_stream():
    leak = measure_leak(causal=False, num_steps=250)
    assert leak["as_trained"] < leak["chance"] - 0.2
    assert leak["streamed"] > leak["chance"] + 0.2


def test_a_resumed_run_does_not_say_again_what_it_has_said(demo, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("finetune.training.run.set_up_logging", lambda: None)

    def said():
        return [r.getMessage() for r in caplog.records if "steps too large, group base" in r.getMessage()]

    settings = {"diagnostics": {"freq": 1}, "ckpt_freq": 3, "optim": {"lr": 0.3, "pct_start": 0.8}}
    run_training(run_args(demo, tmp_path / "run", "full_ttt", max_steps=9, **settings))
    assert len(said()) == 1 and "since step 1" in said()[0]
    caplog.clear()
    for step in (6, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint_{step:06d}")
    run_training(run_args(demo, tmp_path / "run", "full_ttt", max_steps=9, resume="auto", **settings))
    assert [record["step"] for record in read_metrics(tmp_path / "run", "diagnostics")][-1] == 9
    assert said() == []


def test_a_run_that_is_going_and_an_old_one_are_judged(measured, tmp_path, capsys):
    run_dir = shutil.copytree(measured, tmp_path / "run <b>")
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text() + '{"split": "diagnostics", "st')
    report = tmp_path / "report.html"
    assert _status(run_dir, "--report", report) in (0, 1)
    assert "4 measurements until step 4" in capsys.readouterr().out
    page = report.read_text()
    assert "run &lt;b&gt;" in page and "<b>" not in page and "data:image/png;base64," in page
    old = [line for line in log.read_text().splitlines()[:-1] if json.loads(line)["split"] == "train"]
    log.write_text("\n".join(old) + "\n")
    assert _status(run_dir, "--report", tmp_path / "report.png") == 0
    out = capsys.readouterr().out
    assert "There are no records of diagnostics" in out and "Not judged so far: gate_speed" in out
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "does not exist"),
        (lambda d: (d / "metrics.jsonl").write_text("[1]\n{}\n"), "line 1 is not a record"),
        (lambda d: (d / "metrics.jsonl").unlink(), "has nothing to judge yet"),
        (lambda d: (d / "args.yaml").unlink(), "has no args.yaml; give the run_dir of a training"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_status_2(measured, tmp_path, capsys, damage, message):
    run_dir = shutil.copytree(measured, tmp_path / "run")
    damage(run_dir)
    assert _status(run_dir) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
