"""One run at a time in a run directory, and what a killed one leaves does not stay."""

import os
import socket
import subprocess
import sys

import pytest

from finetune.checkpoint.layout import OLD_PREFIX, PARTIAL_PREFIX, list_checkpoints
from finetune.errors import ConfigError
from finetune.training import run as run_module
from finetune.training.run import run_training
from finetune.training.run_lock import LOCK_FILE, RunLock
from finetune.training.trainer import Trainer
from run_helpers import run_args

SETTINGS = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 2, "ckpt_freq": 1}
HOLDER = rf"is being written by another run \(process {os.getpid()} on {socket.gethostname()}\)"
# A process with a child that goes on after it, as a loader does for some seconds.
HOLD = """
import os, sys, time
from pathlib import Path
from finetune.training.run_lock import RunLock
RunLock.keep = RunLock()
RunLock.keep.take(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("second", [{"overwrite_run_dir": True}, {"resume": "auto"}], ids=["new", "resumed"])
def test_a_second_run_in_the_same_folder_ends_and_the_first_keeps_all(demo, tmp_path, monkeypatch, second):
    original, refused = Trainer._train_step, []

    def train_step(self, batches):
        if self.step == 1 and not refused:
            with pytest.raises(ConfigError, match=HOLDER) as caught:
                run_training(run_args(demo, tmp_path / "run", **(SETTINGS | second)))
            refused.append(caught.value)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    run_training(run_args(demo, tmp_path / "run", **SETTINGS))
    assert len(refused) == 1
    assert os.listdir(tmp_path) == ["run"] and len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2
    assert LOCK_FILE not in os.listdir(tmp_path / "run")


def test_of_two_runs_that_start_at_once_one_ends(demo, tmp_path, monkeypatch):
    original = run_module.build_parallel_model

    def overtake(*args, **kwargs):
        (tmp_path / "run").mkdir()
        other.take(tmp_path / "run")
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, "build_parallel_model", overtake)
    with RunLock() as other, pytest.raises(ConfigError, match=HOLDER):
        run_training(run_args(demo, tmp_path / "run", **SETTINGS))


def test_a_lock_dies_with_its_process_though_a_child_lives_on(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        with pytest.raises(ConfigError, match=rf"\(process {holder.pid} on "):
            RunLock().take(tmp_path)
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with RunLock() as lock:
            lock.take(tmp_path)
        os.kill(child, 9)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_was_writing_or_deleting_is_removed_when_it_goes_on(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", **SETTINGS))
    folder = tmp_path / "run" / "checkpoints"
    for prefix in (PARTIAL_PREFIX, OLD_PREFIX):
        (folder / f"{prefix}checkpoint_000001" / "state").mkdir(parents=True)
    run_training(run_args(demo, tmp_path / "run", **(SETTINGS | {"max_steps": 3, "resume": "auto"})))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_without_locks_in_the_file_system_a_run_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("finetune.training.run_lock.fcntl", None)
    with RunLock() as lock:
        lock.take(tmp_path)
    assert "cannot be locked here" in caplog.text and os.listdir(tmp_path) == []
