"""Hours of one voice without words: from LibriLight's folders to a model, and losses along recordings."""

import json

import numpy as np
import pytest
import torch

from audio_helpers import noise, write_flac
from finetune.annotation import annotate_file as annotation
from finetune.annotation.annotate_file import annotate_file, is_annotated
from finetune.annotation.recordings import AudioRecording
from finetune.data.check.command import check
from finetune.data.manifest import write_manifest
from finetune.data.words import Word
from finetune.errors import DataError
from finetune.evaluation.command import evaluate
from finetune.files import read_json_object
from finetune.training.command import train
from finetune.training.run import run_training
from finetune.training.trainer import Trainer
from project_root import ROOT
from run_helpers import read_metrics, run_args

SEC = 6


@pytest.fixture
def librilight(tmp_path):
    """Speaker/book/file.flac, mono at 16 kHz, and beside each what LibriLight says of it."""
    root = tmp_path / "librilight"
    for seed, name in enumerate(("100/a_book/one_64kb", "100/a_book/two_64kb", "200/b_book/one_64kb")):
        path = root / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flac(path, noise(SEC * 16000, seed=seed), 16000)
        about = {
            "speaker": name.split("/")[0],
            "book_meta": {"id": 7},
            "snr": 9.5,
            "voice_activity": [[0, 6]],
        }
        path.with_suffix(".json").write_text(json.dumps(about))
    return root


def test_its_example_trains_on_a_miniature(librilight, demo, command, tmp_path, logs, caplog):
    assert command(write_manifest, librilight, "--text", "none")[0] == 0
    lines = (librilight / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["speaker"] for line in lines] == ["100", "100", "200"]
    for name, part in (("train", lines[:2]), ("eval", lines[2:])):
        (librilight / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    status, output, _ = command(check, librilight / "train.jsonl", "--text", "none", "--mono", "user_silent")
    assert (status, "0 errors" in output) == (0, True), output
    assert command(check, librilight / "train.jsonl", "--mono", "user_silent")[0] == 1
    run_dir = tmp_path / "run"
    data = librilight / "eval.jsonl"
    small = {
        "data.train_data": librilight / "train.jsonl",
        "data.eval_data": data,
        "data.num_workers": 0,
        "eval.long_context.data": data,
        "moshi_paths.hf_repo_id": demo.model_dir,
        "ttt.layers": "1",
        "duration_sec": 2.56,
        "max_steps": 2,
        "num_microbatches": 1,
        "param_dtype": "float32",
        "run_dir": run_dir,
    }
    options = [part for key, value in small.items() for part in (f"--{key}", value)]
    status, _, errors = command(train, ROOT / "example" / "librilight_pretrain.yaml", *options)
    assert (status, errors) == (0, [])
    messages = logs(caplog)
    assert any("Training data: no text (data.text: none)" in line for line in messages)
    records = read_metrics(run_dir, "train") + read_metrics(run_dir, "eval")
    assert all(np.isfinite(record.get("audio_loss", 0.0)) for record in records)
    assert not any("text_loss" in record or "unigram_text_loss" in record for record in records)
    (record,) = read_metrics(run_dir, "eval")
    assert record["loss"] == record["audio_loss"]
    assert np.isfinite([record["long_context_loss"], record["long_context_slope"]]).all()


def test_without_word_timings_it_is_left_out_of_a_manifest_with_text(librilight, command):
    status, _, errors = command(write_manifest, librilight)
    assert status == 2 and "none of 3 audio files can be used" in errors[0]


class Engine:
    sample_rate = 16000
    needs_transcript = False

    def words(self, samples, transcript):
        assert samples.ndim == 1
        return [Word("hello", 0.5, 0.5)]


def test_a_mono_recording_can_be_annotated_and_keeps_what_is_said_of_it(librilight, command):
    recording = AudioRecording(librilight / "100/a_book/one_64kb.flac")
    assert not is_annotated(recording)
    with pytest.raises(DataError, match="mono, it has no right channel; --channels left"):
        annotate_file(recording, Engine())
    annotate_file(recording, Engine(), channels=("left",))
    assert is_annotated(recording)
    content = json.loads(recording.alignment_path.read_text())
    assert content["alignments"] == [["hello", [0.5, 0.5], "SPEAKER_MAIN"]]
    assert content["speaker"] == "100" and content["book_meta"] == {"id": 7}
    assert annotation._kept(recording.alignment_path).keys() == content.keys() - {"alignments"}
    status, _, _ = command(write_manifest, librilight)
    assert status == 1
    (line,) = (librilight / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "100/a_book/one_64kb.flac"


def test_without_text_the_text_head_gets_no_gradient(librilight, demo, command, tmp_path, monkeypatch):
    command(write_manifest, librilight, "--text", "none")
    found = []

    def look(self, result):
        found.append(self.model.text_linear.weight.grad.abs().max().item())
        found.append(self.model.depformer_in[0].weight.grad.abs().max().item())

    monkeypatch.setattr(Trainer, "_update", lambda self, norm: look(self, norm) or self.state.advance(2))
    data = {
        "train_data": str(librilight / "manifest.jsonl"),
        "num_workers": 0,
        "text": "none",
        "mono": "duplicate",
    }
    settings = {"max_steps": 1, "do_ckpt": False, "duration_sec": 2.56, "diagnostics": {"freq": 0}}
    run_training(run_args(demo, tmp_path / "run", "full", data=data, **settings))
    assert found[0] == 0 < found[1]


def long_context(demo, **values):
    values = {"data": str(demo.eval_jsonl), "user": "real", "text": "given", **values}
    return {"eval": {"long_context": values}}


SETTINGS = {"max_steps": 4, "duration_sec": 2.56, "do_ckpt": False}


def test_losses_along_recordings_are_logged_and_the_training_is_the_same(demo, tmp_path, monkeypatch):
    original = Trainer._evaluate

    def watched(self, *, last):
        before = {name: tensor.clone() for name, tensor in self.state.memory.tensors().items()}
        random_state = torch.get_rng_state()
        original(self, last=last)
        after = self.state.memory.tensors()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(random_state, torch.get_rng_state())
        assert all(module.training for module in self.model.modules())

    monkeypatch.setattr(Trainer, "_evaluate", watched)
    run_training(run_args(demo, tmp_path / "without", **SETTINGS))
    run_training(run_args(demo, tmp_path / "with", **SETTINGS, **long_context(demo, freq=2)))
    plain, measured = (read_metrics(tmp_path / name, "train") for name in ("without", "with"))
    for ours, theirs in zip(measured, plain, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    records = read_metrics(tmp_path / "with", "eval")
    assert [record["step"] for record in records] == [2, 4]
    slopes = {"long_context_slope", *(f"long_context_slope_{name}" for name in ("early", "middle", "late"))}
    assert all(record.keys() - {"split", "step"} == slopes | {"long_context_loss"} for record in records)


def test_they_are_those_of_the_checkpoint(demo, tmp_path):
    settings = SETTINGS | {"max_steps": 2, "do_ckpt": True}
    run_training(run_args(demo, tmp_path / "run", **settings, **long_context(demo)))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(demo.eval_jsonl), "--user", "real"]
    out = tmp_path / "out"
    evaluate(["long-context", *arguments, "--text", "given", "--dtype", "float32", "--out", str(out)])
    (scores,) = read_json_object(out / "results.json")["scores"].values()
    (record,) = read_metrics(tmp_path / "run", "eval")
    assert record["long_context_loss"] == pytest.approx(scores["loss"], rel=1e-4)
    assert record["long_context_slope"] == pytest.approx(scores["overall"], rel=1e-3)
    assert record["long_context_slope_late"] == pytest.approx(scores["late"], rel=1e-3)


def test_what_is_wrong_with_their_data_is_one_line_before_the_model_is_built(demo, tmp_path):
    with pytest.raises(DataError, match=r"^eval\.long_context\.data: .*nowhere does not exist"):
        run_training(run_args(demo, tmp_path / "run", **long_context(demo, data=str(tmp_path / "nowhere"))))
    assert not (tmp_path / "run").exists()
