"""Where the metrics of a run go, and what they mean."""

import io
import logging
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
from finetune.distributed import ConsoleHandler
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
    for name in ("gate_opening", "ttt_alpha"):
        assert values[name] == pytest.approx((values[f"{name}/layer_1"] + values[f"{name}/layer_3"]) / 2)
    assert values["gate_opening/layer_3"] > math.tanh(0.1) > values["ttt_alpha/layer_3"]


def test_gates_that_open_both_ways_are_seen_to_open(lm):
    monitor = GateMonitor(lm)
    start = monitor.metrics()
    signs = torch.tensor([1.0, -1.0]).repeat(16)
    for layer in (1, 3):
        lm.transformer.layers[layer].forward_ssm_gating.gating_alpha.data[:] = signs
    opened = monitor.metrics()
    assert opened["ttt_alpha"] < start["ttt_alpha"], "channels cancel"
    assert opened["gate_opening"] == pytest.approx(math.tanh(1)) and start["gate_opening"] < 0.2
    *_, first_of_gates = (name for name in train_line(1, opened).split(" - ")[:2])
    assert first_of_gates.startswith("gate_opening: 0.7")


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


def test_the_recipes_of_the_guide_find_what_they_promise_in_the_logs_of_the_launcher(
    demo, tmp_path, monkeypatch, capfd
):
    head = (ROOT / "slurm" / "training" / "train_moshi_ttt.slurm").read_text()
    files = [
        tmp_path / re.search(rf"^#SBATCH --{name}=(\S+)$", head, re.MULTILINE)[1].replace("%j", "54321")
        for name in ("output", "error")
    ]
    files[0].parent.mkdir(parents=True)

    def run(*options):
        status = command_line(monkeypatch, path, "--resume", "auto", *options)
        for file, text in zip(files, capfd.readouterr(), strict=True):
            with file.open("a") as log:
                log.write(text)
        return status

    path = write_yaml(tmp_path / "a.yaml", run_values(demo, tmp_path / "run", ckpt_freq=1))
    assert run() == 0
    errors = files[1].read_text()
    assert not re.search(r"step|Parameters|Saved|ttt_alpha", errors), "no training line among the errors"
    assert run("--max_steps", "4") == 0
    assert run("--run_dir", str(tmp_path / "diverging"), "--optim.lr", "1e6", "--max_steps", "6") == 1
    guide = (ROOT / "docs" / "training.md").read_text()
    recipes = re.findall(r"^((?:grep|sed) .*?) +#", guide, flags=re.MULTILINE)
    found = [
        subprocess.run(recipe, shell=True, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
        for recipe in recipes
    ]
    everything, gates, rates, diverged, resumed = found
    steps = [f"step: {step:06d}" for step in (1, 2, 3, 4)]
    lines = [line for line in everything if line.startswith("step: ") or " step: " in line]
    for line, step in zip(lines, steps, strict=False):
        names = re.findall(r"(\w+): ", line)
        assert step in line and {"lr_base", "lr_ttt_weights", "lr_ttt_alpha", "loss"} <= set(names)
        assert names.index("gate_opening") < names.index("ttt_alpha") < names.index("ttt_delta")
    assert "ttt_alpha: 256 params, lr=1.00e-02 (10x base)" in everything[0]
    for line, step in zip(gates, steps, strict=False):
        assert re.fullmatch(rf"{step} gate_opening: 0\.\d{{6}}", line)
    for line, step in zip(rates, steps, strict=False):
        assert re.fullmatch(rf"{step} lr_base: \S+ - lr_ttt_weights: \S+ - lr_ttt_alpha: \S+", line)
    assert len(gates) == len(rates) == len(lines) > 4
    assert [line for line in diverged if line.startswith("error: step ")] and len(resumed) == 1


def test_lines_go_on_to_standard_error_when_nobody_reads_standard_output(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    handler = ConsoleHandler(lines_to_stdout=True)
    for level, text in ((logging.INFO, "step 1"), (logging.INFO, "step 2"), (logging.ERROR, "a\nb\x1b[2J")):
        handler.emit(logging.LogRecord("finetune", level, "", 0, text, (), None))
    assert capsys.readouterr().err.splitlines() == ["step 1", "step 2", "a\\x0ab\\x1b[2J"]
    sys.stdout.close()


def test_a_group_without_parameters_has_its_rate_in_the_log(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "frozen", "ttt", do_ckpt=False))
    records = read_metrics(tmp_path / "frozen", "train")
    assert len(records) == 3
    for record in records:
        assert record["lr_base"] == pytest.approx(record["lr_ttt_weights"])  # the multiplier is 1
        assert record["lr_base"] == pytest.approx(record["lr_ttt_alpha"] / 10)
    run_training(run_args(demo, tmp_path / "plain", "lora", do_ckpt=False, max_steps=1))
    assert not any(name.startswith("lr_ttt") for name in read_metrics(tmp_path / "plain", "train")[0])
