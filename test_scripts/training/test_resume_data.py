"""A run that is resumed has the recordings that it had, or says which of them changed."""

import json
import os
import shutil

import numpy as np
import pytest
import sphn
import torch

from finetune.checkpoint.integrity import describe_file
from finetune.data.codes import cache
from finetune.data.codes.cache import FOLDER_NAME
from finetune.errors import ConfigError
from finetune.training.run import run_training
from run_helpers import run_args


@pytest.fixture(scope="module")
def begun(demo, tmp_path_factory):
    """Data of its own and a run of one step on it, to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(demo.train_jsonl.parent, folder / "data")
    train(demo, folder, max_steps=1)
    return folder


@pytest.fixture
def copied(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    return tmp_path


def train(demo, folder, **settings):
    data = {f"{split}_data": str(folder / "data" / f"{split}.jsonl") for split in ("train", "eval")}
    settings |= {"data": data | {"num_workers": 0}, "do_eval": True, "duration_sec": 1.6, "batch_size": 1}
    run_training(run_args(demo, folder / "run", **settings))


def second_recording(folder):
    line = (folder / "data" / "train.jsonl").read_text().splitlines()[1]
    return folder / "data" / json.loads(line)["path"]


def change_a_word(folder):
    path = second_recording(folder).with_suffix(".json")
    content = json.loads(path.read_text())
    content["alignments"][0][0] = "other"
    path.write_text(json.dumps(content))


def change_the_audio(folder):
    path = second_recording(folder)
    samples, rate = sphn.read(str(path))
    sphn.write_wav(str(path), np.ascontiguousarray(samples[:, ::-1]), rate)


def change_the_order(folder):
    manifest = folder / "data" / "train.jsonl"
    manifest.write_text("".join(reversed(manifest.read_text().splitlines(keepends=True))))


CHANGES = {
    change_a_word: r"data\.train_data: the word timings of .*dialogue_001\.wav changed since ",
    change_the_audio: r"data\.train_data: the audio, or the codec, of .*dialogue_001\.wav changed since ",
    change_the_order: r"data\.train_data: lists the same recordings in another order than when ",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_in_the_recordings_of_a_run_is_named(demo, copied, change):
    change(copied)
    with pytest.raises(ConfigError, match=CHANGES[change]) as caught:
        train(demo, copied, max_steps=2, resume="auto")
    assert "2 instead of 2" not in str(caught.value)


def test_timings_that_are_written_anew_and_say_the_same_are_no_change(demo, copied):
    path = second_recording(copied).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    train(demo, copied, max_steps=2, resume="auto")


def test_evaluation_recordings_that_changed_are_told(demo, copied, logs, caplog):
    manifest = copied / "data" / "eval.jsonl"
    manifest.write_text((copied / "data" / "train.jsonl").read_text().splitlines(keepends=True)[0])
    train(demo, copied, max_steps=2, resume="auto")
    (line,) = (line for line in logs(caplog) if line.startswith("data.eval_data: "))
    assert "holds other recordings than when" in line and "checkpoint_000001" in line


def test_codes_that_other_hardware_makes_of_the_same_audio_are_told(demo, copied, monkeypatch, logs, caplog):
    original = cache.encode_recording
    monkeypatch.setattr(cache, "encode_recording", lambda *args: torch.roll(original(*args), 1, -1))
    shutil.rmtree(second_recording(copied).parent / FOLDER_NAME)
    train(demo, copied, max_steps=2, resume="auto")
    assert "The codes of 2 recordings are others than before, made of the same audio." in logs(caplog)


def test_runs_of_earlier_versions_are_gone_on_with(demo, copied):
    folder = copied / "run" / "checkpoints" / "checkpoint_000001"
    facts = json.loads((folder / "resume.json").read_text())
    for name in ("words", "audio", "codes"):
        del facts["data"][name]
    del facts["eval_data"]
    (folder / "resume.json").write_text(json.dumps(facts))
    done = json.loads((folder / "DONE.json").read_text())
    done["files"]["resume.json"] = describe_file(folder / "resume.json")
    (folder / "DONE.json").write_text(json.dumps(done))
    train(demo, copied, max_steps=2, resume="auto")
    assert os.path.isdir(copied / "run" / "checkpoints" / "checkpoint_000002")
