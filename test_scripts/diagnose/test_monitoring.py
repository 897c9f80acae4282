"""Where the metrics of a run go, and what they mean."""

import math
import re
import subprocess
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import make_codes, make_tiny_lm
from finetune.args import TTTArgs
from finetune.monitoring.log_lines import train_line
from finetune.monitoring.ttt_metrics import GateMonitor, InnerLoopRecorder
from finetune.training.run import run_training
from finetune.ttt_integration import apply_ttt_to_model
from project_root import ROOT
from run_helpers import command_line, read_metrics, run_args, run_values, write_yaml


@pytest.fixture
def lm():
    lm = make_tiny_lm()
    apply_ttt_to_model(lm, TTTArgs(enable=True, layers="1,3", mini_batch_size=4, initial_gating_alpha=0.1))
    return lm


def test_tensorboard_reads_the_run(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", do_eval=True))
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {
        "train/loss",
        "train/lr_ttt_alpha",
        "train/ttt_alpha",
        "train/ttt_delta/layer_3",
        "eval/text_loss",
    }
    assert expected <= tags
    logged = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


def test_wandb_gets_the_same_numbers_and_never_the_key(demo, tmp_path, monkeypatch):
    calls = {"log": []}
    fake = types.SimpleNamespace(
        id="run-7",
        login=lambda key: calls.update(key=key),
        init=lambda **options: calls.update(init=options) or fake,
        log=lambda values, step: calls["log"].append((step, values)),
        finish=lambda exit_code: calls.update(exit_code=exit_code),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    wandb = {"project": "p", "offline": True, "key": "secret", "run_name": "n"}
    run_training(run_args(demo, tmp_path / "run", "ttt", wandb=wandb))
    assert calls["key"] == "secret"
    assert calls["init"]["mode"] == "offline" and calls["init"]["name"] == "n"
    assert "secret" not in str(calls["init"])
    assert [step for step, _ in calls["log"]] == [1, 2, 3]
    assert "train/ttt_alpha" in calls["log"][0][1]
    assert calls["exit_code"] == 0
    assert calls["init"]["id"] is None
    run_training(run_args(demo, tmp_path / "run", "ttt", wandb=wandb, resume="auto", max_steps=4))
    assert (calls["init"]["id"], calls["init"]["resume"]) == ("run-7", "allow")
    assert [step for step, _ in calls["log"]] == [1, 2, 3, 4]


def test_gate_metrics_are_those_of_the_float32_masters(lm):
    monitor = GateMonitor(lm)
    gates = [lm.transformer.layers[i].forward_ssm_gating.gating_alpha for i in (1, 3)]
    gates[0].data += 0.2
    gates[1].data[:16] -= 0.4
    values = monitor.metrics()
    assert values["ttt_raw/layer_1"] == pytest.approx(0.3)
    assert values["ttt_alpha/layer_1"] == pytest.approx(math.tanh(0.3))
    assert values["ttt_delta/layer_3"] == pytest.approx(0.2)
    assert values["ttt_delta"] == pytest.approx(0.2)
    assert values["ttt_alpha_min/layer_3"] == pytest.approx(math.tanh(-0.3))
    assert values["ttt_alpha_max/layer_3"] == pytest.approx(math.tanh(0.1))
    assert values["ttt_alpha"] == pytest.approx(
        (values["ttt_alpha/layer_1"] + values["ttt_alpha/layer_3"]) / 2
    )


def test_the_recorder_sees_only_what_it_is_asked_to(lm):
    recorder = InnerLoopRecorder(lm)
    codes = make_codes(lm, 2, 9)
    lm(codes)
    assert recorder.metrics() == {}
    with recorder.recording():
        lm(codes)
    values = recorder.metrics()
    assert set(recorder.trajectories()) == {1, 3} and recorder.trajectories()[1].shape == (3, 9)
    assert 0 < values["inner_loss_after/layer_1"] < values["inner_loss_before/layer_1"]
    assert values["fast_weight_change/layer_1"] > 0
    assert recorder.layers_not_finite() == []
    with recorder.recording(False):
        lm(make_codes(lm, 1, 4))
    assert recorder.metrics() == values


def test_the_recorder_changes_neither_output_nor_gradients(lm):
    codes, results = make_codes(lm, 2, 9), []
    for enabled in (False, True):
        lm.zero_grad()
        with InnerLoopRecorder(lm).recording(enabled):
            out, _ = lm.forward_text(codes)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in lm.transformer.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_padded_frames_are_left_out_of_the_inner_losses(lm):
    codes = make_codes(lm, 2, 8)
    codes[:, :, 6:] = -1
    recorder = InnerLoopRecorder(lm)
    with recorder.recording():
        lm.forward_text(codes)
    losses = recorder.trajectories()[1]
    assert losses[:, 6:].isnan().all() and losses[:, 1:6].isfinite().all()
    assert losses[:, 0].isnan().all()  # no earlier key, nothing to learn
    assert math.isfinite(recorder.metrics()["inner_loss_before/layer_1"])


def test_the_console_line_can_be_grepped():
    line = train_line(7, {"loss": 2.5, "ttt_alpha": 0.005, "lr_ttt_alpha": 3e-4})
    assert line == "step: 000007 - loss: 2.500 - lr_ttt_alpha: 3.00e-04 - ttt_alpha: 0.005000"


def test_the_recipes_of_the_guide_find_what_they_promise(demo, tmp_path, monkeypatch, capfd):
    path = write_yaml(tmp_path / "a.yaml", run_values(demo, tmp_path / "run"))
    assert command_line(monkeypatch, path) == 0
    (tmp_path / "run.log").write_text(
        capfd.readouterr().err + "error: step 4: the loss is not finite (loss nan)\nResumed from run"
    )
    guide = (ROOT / "docs" / "training.md").read_text()
    recipes = re.findall(r"^(grep .*?) +#", guide, flags=re.MULTILINE)
    assert len(recipes) == 4
    found = [
        subprocess.run(recipe, shell=True, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
        for recipe in recipes
    ]
    assert [len(lines) for lines in found] == [3, 3, 1, 1]
    assert all(line.startswith("- ttt_alpha: 0.0") for line in found[0])
    assert found[1][0].startswith("- lr_ttt_alpha: ")
