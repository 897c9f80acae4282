"""What a run writes beside its checkpoints: a full disk is one line with the file, trackers never end it."""

import errno
import os
import sys

import pytest
from tensorboard.compat.tensorflow_stub.io import gfile

from finetune.checkpoint.layout import list_checkpoints
from finetune.training import samples
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from run_helpers import command_line, read_metrics, run_args, run_values, write_yaml

SETTINGS = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 3, "ckpt_freq": 1}
SAMPLES = {"sample_freq": 1, "sample_duration_sec": 0.2}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(*args, **kwargs):
    raise FULL


class FullFile:
    """An open file on a full disk, which complains once more when it is closed."""

    write = flush = close = fail


def full_metrics(trainer, patch):
    trainer.writer._file.close()
    trainer.writer._file = FullFile()


def full_tensorboard(trainer, patch):
    patch.setattr(gfile.LocalFileSystem, "append", fail)


def full_samples(trainer, patch):
    def write_wav(path, *_):
        raise ValueError(f'"{path}": No space left on device (os error 28)')

    patch.setattr(samples.sphn, "write_wav", write_wav)


FILES = {
    full_metrics: "metrics.jsonl",
    full_tensorboard: "tb",
    full_samples: "samples/step_2.wav",
}


@pytest.mark.parametrize("trouble", FILES, ids=lambda trouble: trouble.__name__)
def test_a_full_disk_is_one_line_that_names_the_file(demo, tmp_path, monkeypatch, capfd, trouble):
    original = Trainer._train_step

    def train_step(self, batches):
        if self.step == 1:
            trouble(self, monkeypatch)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    path = write_yaml(tmp_path / "c.yaml", run_values(demo, tmp_path / "run", **(SETTINGS | SAMPLES)))
    assert command_line(monkeypatch, path) == 2
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and "Exception" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {tmp_path / 'run' / FILES[trouble]}: cannot be written (")
    assert "No space left on device" in line
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


class FailingTracker:
    """A W&B client whose service goes away after it has started."""

    id = "run-7"
    Audio = str

    def __init__(self, fails_at):
        self.calls, self.fails_at = [], fails_at

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == self.fails_at:
                raise ConnectionError("the service is gone")
            return self

        return call


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_a_warning_and_no_training(
    demo, tmp_path, monkeypatch, logs, caplog, fails_at
):
    tracker = FailingTracker(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    run_training(run_args(demo, tmp_path / "run", **(SETTINGS | SAMPLES), wandb={"project": "p"}))
    warnings = [line for line in logs(caplog) if line.startswith("W&B has failed")]
    assert len(warnings) == 1 and "ConnectionError: the service is gone" in warnings[0]
    assert len(read_metrics(tmp_path / "run", "train")) == 3
    assert tracker.calls.count(fails_at) == 1


def test_a_wandb_run_with_audio_samples_trains_and_is_gone_on_with(demo, tmp_path, logs, caplog):
    """With the real package, where it is installed: `pip install 'moshi-ttt[wandb]'`."""
    pytest.importorskip("wandb")
    settings = SETTINGS | SAMPLES | {"wandb": {"project": "p", "offline": True}}
    run_training(run_args(demo, tmp_path / "run", **settings))
    run_training(run_args(demo, tmp_path / "run", **(settings | {"max_steps": 4, "resume": "auto"})))
    assert not [line for line in logs(caplog) if line.startswith("W&B has failed")]
    assert len(read_metrics(tmp_path / "run", "train")) == 4
    media = list((tmp_path / "run" / "wandb").rglob("sample_*.wav"))
    assert len(media) == 4 and all(path.stat().st_size > 1000 for path in media)
