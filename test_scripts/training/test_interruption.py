"""Signals, kills and full disks: what was saved stays, and the resumed run equals the uninterrupted one."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint.layout import PARTIAL_PREFIX, list_checkpoints, step_of
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from project_root import ROOT
from run_helpers import command_line, read_metrics, run_args, run_values, write_yaml

SETTINGS = {"duration_sec": 1.6, "batch_size": 1}


def final_weights(run_dir: Path) -> dict:
    folder = list_checkpoints(run_dir / "checkpoints")[-1] / "consolidated"
    return load_file(folder / "lora.safetensors") | load_file(folder / "ttt.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = final_weights(a), final_weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(demo, tmp_path, monkeypatch, capfd, number):
    original = Trainer._train_step

    def interrupt_in_second_step(self, batches):
        if self.step == 1:
            os.kill(os.getpid(), number)
        return original(self, batches)

    settings = SETTINGS | {"max_steps": 4, "ckpt_freq": 4}
    run_dir = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupt_in_second_step)
        path = write_yaml(tmp_path / "config.yaml", run_values(demo, run_dir, **settings))
        assert command_line(patch, path) == 0
    assert (
        f"Stopped at step 2 of 4 as asked. Go on with train.py --resume {run_dir}" in capfd.readouterr().out
    )
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["checkpoint_000002"]
    assert signal.getsignal(number) is before
    run_training(run_args(demo, "", resume=str(run_dir), **settings))
    run_training(run_args(demo, tmp_path / "whole", **settings))
    assert_same_weights(tmp_path / "whole", run_dir)
    assert [record["step"] for record in read_metrics(run_dir, "train")] == [1, 2, 3, 4]


def test_a_warning_while_the_model_loads_stops_before_the_first_step(demo, tmp_path, monkeypatch, capfd):
    def warn(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    from finetune.training import run

    original = run.build_parallel_model
    monkeypatch.setattr(run, "build_parallel_model", warn)
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", **SETTINGS))
    assert command_line(monkeypatch, path) == 0
    assert "Stopped at step 0 of 3 as asked." in capfd.readouterr().out
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def start(config: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "train.py", "--config", str(config), "--resume", "auto"],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
        )


def kill_at_random(process: subprocess.Popen, log: Path, checkpoints: Path, rng: random.Random) -> None:
    """Kill a training somewhere after its first saved checkpoint, every other time inside a save."""
    deadline = time.monotonic() + 300

    def wait_for(condition):
        while not condition() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    saves = rng.randrange(1, 4)
    wait_for(lambda: log.read_text().count("Saved ") >= saves)
    if rng.random() < 0.5:
        wait_for(lambda: any(checkpoints.glob(f"{PARTIAL_PREFIX}*")))
        time.sleep(rng.random() * 0.05)
    else:
        time.sleep(rng.random() * 0.5)
    process.kill()
    process.wait()


def train_with_kills(demo, folder: Path, *, kills: int, steps: int, seed: int) -> int:
    """Train in spite of kills and compare with a run without them; returns how many hit a save."""
    settings = SETTINGS | {"max_steps": steps, "ckpt_freq": 2, "num_ckpt_keep": 2}
    rng = random.Random(seed)
    run_dir = folder / "run"
    config = write_yaml(folder / "config.yaml", run_values(demo, run_dir, **settings))
    inside_saves = 0
    newest = 0
    for number in range(kills + 1):
        log = folder / f"{number}.log"
        process = start(config, log)
        if number < kills:
            kill_at_random(process, log, run_dir / "checkpoints", rng)
            inside_saves += any((run_dir / "checkpoints").glob(f"{PARTIAL_PREFIX}*"))
        else:
            assert process.wait(600) == 0, log.read_text()
        text = log.read_text()
        assert "Traceback" not in text and "cannot be used" not in text, text
        if newest:
            assert re.search(rf"Resumed from .*checkpoint_{newest:06d}\.", text) or "complete" in text, text
        saved = [int(step) for step in re.findall(r"Saved .*checkpoint_(\d+)", text)]
        newest = step_of(list_checkpoints(run_dir / "checkpoints")[-1])
        assert newest >= max(saved, default=0)
    run_training(run_args(demo, folder / "whole", **settings))
    assert_same_weights(folder / "whole", run_dir)
    losses = [[record["loss"] for record in read_metrics(folder / n, "train")] for n in ("whole", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == steps
    return inside_saves


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_happened(demo, tmp_path):
    train_with_kills(demo, tmp_path, kills=2, steps=24, seed=1)


@pytest.mark.slow
def test_twenty_kills_some_inside_a_save_lose_nothing(demo, tmp_path):
    assert train_with_kills(demo, tmp_path, kills=20, steps=150, seed=2) >= 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for about one checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before_and_training_may_go_on(
    small_disk, demo, tmp_path, capfd, monkeypatch, background
):
    settings = SETTINGS | {"max_steps": 4, "ckpt_freq": 1, "ckpt_async": background}
    run_dir = small_disk / "run"
    path = write_yaml(tmp_path / "config.yaml", run_values(demo, run_dir, **settings))
    assert command_line(monkeypatch, path) == 2
    output = capfd.readouterr().err
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in output
    assert "No space left on device" in lines[0] and "earlier checkpoints are intact" in lines[0]
    saved = list_checkpoints(run_dir / "checkpoints")
    assert [path.name for path in saved] == ["checkpoint_000001"]
    assert not list((run_dir / "checkpoints").glob(f"{PARTIAL_PREFIX}*"))

    assert command_line(monkeypatch, path, "--resume", "auto", "--ckpt_on_error", "continue") == 2
    output = capfd.readouterr().err
    assert output.count("Training goes on (ckpt_on_error: continue).") == 2
    assert "checkpoint_000004: the checkpoint cannot be written" in output  # the last one must not be lost
    assert [record["step"] for record in read_metrics(run_dir, "train")] == [1, 2, 3, 4]
    assert list_checkpoints(run_dir / "checkpoints") == saved

    run_training(run_args(demo, tmp_path / "elsewhere", resume=str(run_dir), **settings))
    run_training(run_args(demo, tmp_path / "whole", **settings))
    assert_same_weights(tmp_path / "whole", tmp_path / "elsewhere")
