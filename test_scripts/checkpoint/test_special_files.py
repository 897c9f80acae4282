"""Pipes and devices where files are expected: refused in one line, never waited for."""

import os
import signal
from pathlib import Path

import pytest

from finetune.annotation.recordings import find_recordings
from finetune.args import TrainArgs
from finetune.base_model.weight_files import read_header
from finetune.data.check.full import Spelling
from finetune.data.codes.code_file import CorruptCodesError, read_entry
from finetune.data.recordings.lines import read_manifest
from finetune.data.words import load_alignments, look_at_timings
from finetune.errors import UserError
from finetune.evaluation.spoken.zerospeech import _read_gold
from finetune.files import read_json_object
from finetune.monitoring.metrics_file import MetricsWriter, read_records
from moshi_ttt.files.state_file import StateFile


@pytest.fixture(autouse=True)
def nothing_waits():
    """A test that waits for the other end of a pipe fails instead of standing still."""

    def fail(*_):
        raise AssertionError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "config.json": read_json_object,
    "words.json": load_alignments,
    "conditions.json": look_at_timings,
    "manifest.jsonl": lambda path: list(read_manifest(str(path), key="data.train_data")),
    "recordings.jsonl": lambda path: find_recordings(path),
    "codes.safetensors": read_entry,
    "weights.safetensors": read_header,
    "memory.safetensors": lambda path: StateFile(path, kind="moshi-ttt memory 1"),
    "metrics.jsonl": lambda path: read_records(path.parent, "train"),
    "tokenizer.model": Spelling,
    "gold.csv": lambda path: list(_read_gold(path, "swuggy")),
}


@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_or_device_is_refused_wherever_a_file_is_read(tmp_path, name, target):
    path: Path = tmp_path / name
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    with pytest.raises(
        UserError, match=r"pipe or device|not a file|does not exist|neither a folder"
    ) as caught:
        READERS[name](path)
    assert str(path) in str(caught.value)


def test_a_pipe_among_the_codes_of_recordings_is_passed_over(tmp_path):
    os.mkfifo(tmp_path / "a.0123.safetensors")
    with pytest.raises(CorruptCodesError, match="it is a pipe or device, not a file"):
        read_entry(tmp_path / "a.0123.safetensors")


def test_metrics_are_not_written_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        MetricsWriter(tmp_path, TrainArgs(full_finetuning=True))
