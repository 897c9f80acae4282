"""What a run does with mono recordings, and with recordings that it cannot use."""

import json
import logging
import shutil

import numpy as np
import pytest
import sphn
import torch

from finetune.base_model.codec import load_codec
from finetune.base_model.locate import find_model_files
from finetune.data.codes.mono import Voices
from finetune.data.pipeline import build_datasets, load_recordings
from finetune.data.recordings.skipped import MAX_WARNINGS, SKIPPED_FILE
from finetune.errors import ConfigError, DataError
from finetune.training import run as run_module
from finetune.training.run import run_training
from finetune.wrapped_model import build_model
from run_helpers import read_metrics, run_args

SEC = 1.6


def write_recording(folder, name, *, channels=2, seed=0):
    samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (channels, round(SEC * 24000)))
    path = folder / f"{name}.wav"
    sphn.write_wav(str(path), samples.astype(np.float32).squeeze(), 24000)
    path.with_suffix(".json").write_text('{"alignments": [["Hi", [0.1, 0.3], "SPEAKER_MAIN"]]}')
    return {"path": path.name, "duration": SEC}


def write_manifest(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def args_of(demo, tmp_path, manifest, **data):
    data = {"train_data": str(manifest), "num_workers": 0, "cache_dir": str(tmp_path / "codes"), **data}
    settings = {"duration_sec": 0.8, "max_steps": 1, "do_ckpt": False, "data": data}
    return run_args(demo, tmp_path / "run", "full", **settings)


def train_data(args):
    """The chunks that a run with this configuration trains on."""
    info = find_model_files(args.moshi_paths)
    mimi = load_codec(info, torch.device("cpu"))
    model = build_model(args, info, device=torch.device("cpu"))
    return build_datasets(args, load_recordings(args), info, model, mimi)[0]


@pytest.fixture
def messages(monkeypatch, caplog):
    """What a run logs, which its own logging would otherwise displace."""
    monkeypatch.setattr(run_module, "set_up_logging", lambda: None)
    caplog.set_level(logging.INFO, logger="finetune")
    return lambda: caplog.messages


def test_a_mono_recording_is_an_error_that_names_the_choices(demo, tmp_path):
    manifest = write_manifest(tmp_path, write_recording(tmp_path, "a", channels=1))
    with pytest.raises(DataError, match=r"a\.wav: mono, .* set data\.mono to duplicate .* or user_silent"):
        run_training(args_of(demo, tmp_path, manifest))
    assert not (tmp_path / "run").exists()


def test_mono_recordings_become_two_voices_by_the_policy(demo, tmp_path):
    lines = [write_recording(tmp_path, name, channels=channels) for name, channels in (("a", 1), ("b", 2))]
    manifest = write_manifest(tmp_path, *lines)
    codes = {
        policy: train_data(args_of(demo, tmp_path, manifest, mono=policy))[0]
        for policy in ("duplicate", "user_silent")
    }
    num_codebooks = (len(codes["duplicate"]) - 1) // 2
    voice, user = codes["duplicate"][1:].split(num_codebooks)
    assert torch.equal(voice, user)
    own, silent = codes["user_silent"][1:].split(num_codebooks)
    assert torch.equal(own, voice) and not torch.equal(silent, user)
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    line = write_recording(quiet, "a", channels=2)
    samples = np.zeros((2, round(SEC * 24000)), np.float32)
    sphn.write_wav(str(quiet / "a.wav"), samples, 24000)
    expected = train_data(args_of(demo, quiet, write_manifest(quiet, line)))[0]
    assert torch.equal(silent, expected[1 + num_codebooks :]), "as if a silent channel had been encoded"


def test_the_policy_of_mono_recordings_encodes_nothing_again(demo, tmp_path):
    lines = [write_recording(tmp_path, name, channels=channels) for name, channels in (("a", 1), ("b", 2))]
    manifest = write_manifest(tmp_path, *lines)
    train_data(args_of(demo, tmp_path, manifest, mono="duplicate"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    train_data(args_of(demo, tmp_path, manifest, mono="user_silent"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()} == before
    with pytest.raises(DataError, match="mono"):
        train_data(args_of(demo, tmp_path, manifest))


def test_codes_of_mono_recordings_are_never_taken_for_two_voices():
    class Codes:
        num_codebooks = 2

        def load(self, recording, start_frame=0, num_frames=None):
            return torch.zeros(2, 3, dtype=torch.int64)

    recording = type("R", (), {"path": "a.wav"})
    with pytest.raises(DataError, match="mono"):
        Voices(Codes(), "error").load(recording)


def broken_manifest(tmp_path):
    """Two recordings that are right and four lines with faults."""
    good = [write_recording(tmp_path, name, seed=i) for i, name in enumerate(("a", "b"))]
    (tmp_path / "c.wav").write_bytes(b"no audio")
    (tmp_path / "c.json").write_text('{"alignments": [["Hi", [0.1, 0.3], "SPEAKER_MAIN"]]}')
    cut = write_recording(tmp_path, "d")
    (tmp_path / "d.json").write_text('{"alignments": [["word", [0.1, "late"], "SPEAKER_MAIN"]]}')
    gone = {"path": "gone.wav", "duration": 1}
    bad = {"path": "c.wav", "duration": 1}
    return write_manifest(tmp_path, good[0], gone, bad, good[1], cut, {"duration": 3})


def test_the_first_fault_ends_a_run_and_the_others_are_counted(demo, tmp_path):
    with pytest.raises(DataError) as caught:
        run_training(args_of(demo, tmp_path, manifest := broken_manifest(tmp_path)))
    text = str(caught.value)
    assert text.startswith(f"data.train_data: {manifest} line 2: audio file {tmp_path / 'gone.wav'}")
    assert text.endswith(f"and 3 more; `python -m finetune.data.check {manifest}` lists them.")
    assert "\n" not in text and not (tmp_path / "run").exists()


def test_what_is_left_out_is_counted_and_listed(demo, tmp_path, messages):
    manifest = broken_manifest(tmp_path)
    run_training(args_of(demo, tmp_path, manifest, on_error="skip"))
    skipped = json.loads((tmp_path / "run" / SKIPPED_FILE).read_text())
    assert [(entry["line"], entry["path"].rpartition("/")[2]) for entry in skipped] == [
        (2, "gone.wav"),
        (3, "c.wav"),
        (5, "d.wav"),
        (6, ""),
    ]
    assert all(entry["manifest"] == str(manifest) for entry in skipped)
    assert sum(message.startswith("Left out: ") for message in messages()) == 4
    assert any(message.startswith("Training data: 2 recordings") for message in messages())
    assert len(read_metrics(tmp_path / "run", "train")) == 1


def test_many_faults_are_not_all_printed(demo, tmp_path, messages):
    gone = [{"path": f"{i}.wav", "duration": 1} for i in range(MAX_WARNINGS + 5)]
    manifest = write_manifest(tmp_path, write_recording(tmp_path, "a"), *gone)
    run_training(args_of(demo, tmp_path, manifest, on_error="skip"))
    assert sum(message.startswith("Left out: ") for message in messages()) == MAX_WARNINGS
    assert any(message == f"Left out so far: {MAX_WARNINGS + 5} recordings." for message in messages())
    assert len(json.loads((tmp_path / "run" / SKIPPED_FILE).read_text())) == MAX_WARNINGS + 5


def test_a_run_without_any_recording_left_is_an_error(demo, tmp_path):
    manifest = write_manifest(tmp_path, {"path": "gone.wav", "duration": 1})
    with pytest.raises(DataError, match=r"no recording is left that can be used; the first: .*gone\.wav"):
        run_training(args_of(demo, tmp_path, manifest, on_error="skip"))


def test_what_no_recording_is_to_blame_for_is_always_an_error(demo, tmp_path):
    manifest = write_manifest(tmp_path, write_recording(tmp_path, "a"))
    (tmp_path / "file").write_text("")
    args = args_of(demo, tmp_path, manifest, on_error="skip", cache_dir=str(tmp_path / "file" / "codes"))
    with pytest.raises(DataError, match=r"^data\.cache_dir: cannot write Mimi codes"):
        run_training(args)


def test_going_on_without_a_recording_that_was_there_is_refused(demo, tmp_path):
    lines = [write_recording(tmp_path, name, seed=i) for i, name in enumerate("abc")]
    manifest = write_manifest(tmp_path, *lines)
    settings = {"duration_sec": 0.8, "max_steps": 1}
    data = {"train_data": str(manifest), "num_workers": 0, "on_error": "skip"}
    run_training(run_args(demo, tmp_path / "run", "full", data=data, **settings))
    (tmp_path / "b.wav").write_bytes(b"damaged")
    again = {**settings, "max_steps": 2, "resume": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"holds other recordings .* \(2 instead of 3"):
        run_training(run_args(demo, tmp_path / "run", "full", data=data, **again))


def test_several_manifests_with_shares_train(demo, tmp_path, messages):
    folders = [tmp_path / "x", tmp_path / "y z"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_manifest(folder, write_recording(folder, "a", seed=seed), write_recording(folder, "b"))
    source = f"{folders[0]}:0.7, {folders[1] / 'data.jsonl'}:0.3"
    data = train_data(args_of(demo, tmp_path, source))
    assert [(share.size, share.weight) for share in data.shares(of_recordings=True)] == [(2, 0.7), (2, 0.3)]
    run_training(args_of(demo, tmp_path, source))
    assert len(read_metrics(tmp_path / "run", "train")) == 1
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(DataError, match=r"^data\.eval_data: .* has a weight, but each recording"):
        args = args_of(demo, tmp_path, source, eval_data=f"{folders[0]}:1")
        run_training(run_args(demo, tmp_path / "run", "full", data=vars(args.data), do_eval=True))
