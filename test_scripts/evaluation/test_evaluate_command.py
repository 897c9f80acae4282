"""evaluate.py long-context: results, going on after an interruption, failures, and a user's mistakes."""

import csv
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import sphn
from safetensors.numpy import load_file

from evaluation_helpers import failure, run_evaluate
from finetune.commands import run_command
from finetune.evaluation.command import evaluate
from finetune.evaluation.long_context import measure
from project_root import ROOT
from run_helpers import checkpoint_content

RATE = 24000
FRAMES = {"a.wav": 90, "b/a.wav": 70, "c.wav": 60}
WINDOWS = ("--at", "30,66,80,5000", "--half-width", 10, "--bin-frames", 25, "--resamples", 50)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Three stereo recordings of 60 to 90 frames with word timings; the first test encodes them."""
    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for name, num_frames in FRAMES.items():
        time = np.arange(num_frames * 1920) / RATE
        voices = [0.2 * np.sin(2 * np.pi * pitch * time) * np.sin(3 * time) for pitch in (180, 260)]
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        noise = 0.01 * generator.standard_normal((2, len(time)))
        sphn.write_wav(str(path), (np.stack(voices) + noise).astype(np.float32), RATE)
        words = [["hello", [0.5, 0.9], "SPEAKER_MAIN"], ["again", [2.0, 2.4], "SPEAKER_MAIN"]]
        path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
    return folder


@pytest.fixture
def command(capsys, untrained_run, recordings, tmp_path):
    """Run the command in this process; return its status, output and error lines."""

    def run(*options, mode="lora_ttt", data=None, out="out", checkpoint=None):
        arguments = ["long-context", "--checkpoint", checkpoint or untrained_run(mode)]
        arguments += ["--data", data or recordings, *WINDOWS, "--chunk-frames", 32]
        if out is not None:
            arguments += ["--out", tmp_path / out]
        return run_evaluate(capsys, *arguments, *options)

    return run


@pytest.fixture
def results(command, tmp_path):
    """Run it without mistakes; return what it wrote."""

    def run(*options, out="out", **settings):
        status, output, errors = command(*options, out=out, **settings)
        assert (status, errors) == (0, []), output
        return json.loads((tmp_path / out / "results.json").read_text()) | {"output": output}

    return run


@pytest.fixture
def passes(monkeypatch):
    """The passes through the model: recording and mode of the memory; some may be made to go wrong."""
    made, original = [], measure.stream_losses

    def counted(lm, stream, **settings):
        made.append(stream.name)
        if counted.interrupt_at == len(made):
            raise KeyboardInterrupt
        losses = original(lm, stream, **settings)
        if stream.name == counted.break_name:
            losses.audio[2, 5] = math.inf
        return losses

    counted.interrupt_at, counted.break_name = 0, None
    counted.made = made
    monkeypatch.setattr(measure, "stream_losses", counted)
    return counted


def test_arms_are_measured_on_the_same_frames_and_reported(results, tmp_path):
    found = results("--compare")
    recordings = {entry["name"]: entry for entry in found["data"]["recordings"]}
    assert {name: entry["num_frames"] for name, entry in recordings.items()} == FRAMES
    assert list(found["scores"]) == ["on", "frozen", "off"]
    losses = {
        arm: [load_file(tmp_path / "out" / entry["files"][arm])["audio"] for entry in recordings.values()]
        for arm in found["scores"]
    }
    for arm, scores in found["scores"].items():
        every = np.concatenate([x.mean(0) for x in losses[arm]])
        assert scores["loss"] == pytest.approx(every.mean(), rel=1e-5)
        window = np.concatenate([x[:, 20:40].mean(0) for x in losses[arm]])
        assert scores["librilight_30"] == pytest.approx(window.mean(), rel=1e-5)
        assert scores["librilight_5k"] is None
        assert scores["overall"] is not None and scores["late"] is not None
    details = found["details"]["on"]["audio"]
    assert (details["librilight_66"]["num_frames"], details["librilight_66"]["num_recordings"]) == (34, 2)
    assert (
        details["librilight_80"]["interval"] is None and "two recordings" in details["librilight_80"]["note"]
    )
    semantic = np.concatenate([x[0] for x in losses["on"]]).mean()
    assert found["details"]["on"]["semantic"]["loss"]["value"] == pytest.approx(semantic, rel=1e-5)
    assert found["details"]["on"]["text"]["loss"]["value"] is None
    difference = found["differences"]["on - frozen"]["audio"]["loss"]
    assert difference["value"] == pytest.approx(
        found["scores"]["on"]["loss"] - found["scores"]["frozen"]["loss"], abs=1e-5
    )
    assert difference["value"] != 0 and difference["interval"][0] <= difference["value"]
    assert found["model"]["step"] == 7 and found["model"]["attention_windows"] == [500, 25, 500, 25]
    assert found["failures"] == {} and "text loss" not in found["output"]
    assert f"{found['scores']['frozen']['librilight_30']:.4f}" in found["output"]
    assert "differences, with 95 % intervals over recordings\n" in found["output"]
    assert "Attention window: 25 frames (2 s) in 2 layers (1, 3)." in found["output"]


def test_one_recording_has_no_intervals_and_no_table_says_otherwise(results, recordings):
    output = results("--compare", data=recordings / "c.wav")["output"]
    assert "\ndifferences\n" in output and "slope in nats per 1,000 frames\n" in output
    assert "95 %" not in output and "no intervals: they would need at least two recordings" in output


def test_positions_and_picture_are_written(results, tmp_path):
    found = results()
    with (tmp_path / "out" / "positions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["start"], row["num_frames"], row["num_recordings"]) for row in rows] == [
        ("0", "75", "3"),
        ("25", "75", "3"),
        ("50", "55", "3"),
        ("75", "15", "1"),
    ]
    mean = sum(float(row["audio"]) * int(row["num_frames"]) for row in rows) / sum(FRAMES.values())
    assert mean == pytest.approx(found["scores"]["on"]["loss"], abs=1e-5)
    assert rows[0]["text"] == ""
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_text_and_user_streams_change_what_is_measured(results):
    none = results(out="none")["scores"]["on"]["loss"]
    given = results("--text", "given", "--user", "real", out="given")
    own = results("--text", "own", out="own")
    assert given["details"]["on"]["text"]["loss"]["num_frames"] == sum(FRAMES.values())
    assert "text loss in nats" in given["output"]
    assert own["details"]["on"]["text"]["loss"]["value"] is None
    assert len({none, given["scores"]["on"]["loss"], own["scores"]["on"]["loss"]}) == 3


def test_windows_are_set_where_asked_and_reported(results):
    narrow = results("--ttt-layer-context", 5, "--non-ttt-layer-context", 8, out="narrow")
    assert narrow["model"]["attention_windows"] == [8, 5, 8, 5]
    assert "--ttt-layer-context: set in 2 layers" in narrow["output"]
    assert "Attention window: 8 frames (0.64 s) in 2 layers (0, 2)." in narrow["output"]
    assert narrow["scores"]["on"]["loss"] != results(out="wide")["scores"]["on"]["loss"]


def test_trajectories_are_summarised_and_plotted(results, tmp_path):
    found = results("--compare", "--trajectories")
    assert found["scores"]["on"] == results("--compare")["scores"]["on"]
    folder = tmp_path / "out" / "trajectories"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == FRAMES.keys() and set(summary["c.wav"]) == {"1", "3"}
    # With the step that the delayed codebooks need, without the first frame, which has no earlier key.
    assert (summary["c.wav"]["1"]["num_frames"], summary["c.wav"]["1"]["num_excluded"]) == (60, 1)
    assert 0.9 < summary["a.wav"]["3"]["share_ordered"] < 1
    names = {path.name for path in folder.glob("*.png")}
    assert names == {"inner_loss_layer_1.png", "inner_loss_layer_3.png"}
    assert "W0>before>after" in found["output"]


def test_a_second_run_computes_nothing_that_is_there(results, passes):
    first = results("--ttt", "frozen")
    assert len(passes.made) == 3
    again = results("--ttt", "frozen")
    assert len(passes.made) == 3 and "3 measurements were there already" in again["output"]
    assert again["details"] == first["details"]
    moved = results("--ttt", "frozen", "--at", "40", "--half-width", "5")
    assert len(passes.made) == 3 and "librilight_40" in moved["scores"]["frozen"]
    compared = results("--compare")
    assert len(passes.made) == 9
    assert compared["scores"]["frozen"] == first["scores"]["frozen"]


def test_an_interrupted_measurement_goes_on_where_it_was(command, results, passes, tmp_path):
    whole = results("--compare", out="whole")
    passes.made.clear()
    passes.interrupt_at = 5
    status, _, errors = command("--compare", out="parts")
    assert (status, errors) == (130, []) and not (tmp_path / "parts" / "results.json").exists()
    assert len(list((tmp_path / "parts" / "streams").iterdir())) == 4
    passes.interrupt_at = 0
    passes.made.clear()
    parts = results("--compare", out="parts")
    assert passes.made == ["b/a.wav", "b/a.wav", "c.wav", "c.wav", "c.wav"]
    assert parts["details"] == whole["details"]


def test_a_loss_file_that_is_damaged_or_of_another_arm_is_measured_again(results, passes, tmp_path):
    first = results("--compare")
    streams = tmp_path / "out" / "streams"
    frozen, off, *_ = (path for path in sorted(streams.iterdir()) if "on" not in path.suffixes[-2])
    on = frozen.with_name(frozen.name.replace("frozen", "on"))
    on.write_bytes(frozen.read_bytes())
    off.write_bytes(off.read_bytes()[:-100])
    assert results("--compare")["details"] == first["details"]
    assert len(passes.made) == 9 + 2
    content = bytearray(on.read_bytes())
    content[-400:-200] = bytes(200)
    on.write_bytes(content)
    assert results("--compare")["details"] == first["details"]
    assert len(passes.made) == 9 + 3


def test_damaged_trajectories_are_recorded_again(results, passes, tmp_path):
    results("--trajectories")
    first, second, third = sorted((tmp_path / "out" / "trajectories").glob("*.safetensors"))
    whole = load_file(first)
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"something else")
    third.unlink()
    results("--trajectories")
    again = load_file(first)
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[name], whole[name], equal_nan=True) for name in whole)
    assert all(np.isfinite(whole[name][:, 1:]).all() for name in whole)
    assert second.stat().st_size > 1000 and third.is_file()
    assert len(passes.made) == 3 + 3


def test_damaged_settings_of_a_folder_say_what_to_do(results, command, tmp_path):
    results()
    (tmp_path / "out" / "settings.json").write_text("{")
    status, _, errors = command()
    assert status == 2 and "settings.json: not valid JSON" in errors[0] and "remove it to go on" in errors[0]


def test_by_default_results_of_one_setting_lie_in_the_run_directory(command, untrained_run):
    folder = untrained_run("ttt") / "evaluation" / "long_context"
    for options, num_folders in (((), 1), ((), 1), (("--max-frames", 50), 2)):
        status, _, errors = command(*options, mode="ttt", out=None)
        assert (status, errors) == (0, [])
        names = sorted(path.name for path in folder.iterdir())
        assert len(names) == num_folders and all(name.startswith("step_000007-") for name in names)


def test_other_settings_or_another_model_do_not_mix_in_one_folder(command, results):
    results()
    for options, name in (
        (("--ttt-layer-context", 5), "attention_windows [500, 25, 500, 25] instead of [500, 5, 500, 5]"),
        (("--user", "silent"), 'user "empty" instead of "silent"'),
        (("--dtype", "bfloat16"), 'dtype "float32" instead of "bfloat16"'),
    ):
        status, _, errors = command(*options)
        assert status == 2 and name in errors[0] and "choose another folder" in errors[0]
    status, _, errors = command(mode="ttt")
    assert status == 2 and "fingerprint" in errors[0]


def test_a_model_without_ttt_has_one_plain_arm(results, command):
    found = results(mode="lora")
    assert list(found["scores"]) == ["plain"] and found["differences"] == {}
    status, _, errors = command("--compare", mode="lora", out="compared")
    assert status == 2 and "has no TTT layers to compare with" in errors[0]
    status, _, errors = command("--ttt-layer-context", 5, mode="lora", out="windows")
    assert status == 2 and "--ttt-layer-context: 5 would apply to no layer" in errors[0]


def test_failures_are_named_never_averaged_and_counted(command, results, passes, recordings, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in FRAMES:
        (data / name.replace("/", "-")).symlink_to(recordings / name)
    good = results(data=data, out="good")
    (data / "noise.wav").write_bytes(b"noise")
    passes.break_name = "c.wav"
    status, output, errors = command("--compare", "--max-failures", 1, data=data)
    assert status == 2 and len(errors) == 1 and "2 of the recordings failed, 1 may" in errors[0]
    assert errors[0].count("noise.wav") == 1  # reasons name the file themselves
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(found["failures"]) == ["c.wav", "noise.wav"]
    assert "not finite" in found["failures"]["c.wav"] and "failed: c.wav" in output
    assert [entry["name"] for entry in found["data"]["recordings"]] == ["a.wav", "b-a.wav"]
    assert found["details"]["on"]["audio"]["loss"]["num_frames"] == 160
    assert found["scores"]["on"]["librilight_66"] == pytest.approx(good["scores"]["on"]["librilight_66"])
    status, _, errors = command("--compare", "--max-failures", 2, data=data)
    assert (status, errors) == (0, [])


def test_mistakes_are_one_line(command, tmp_path, recordings, untrained_run):
    fails = partial(failure, command, tmp_path)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    assert "no checkpoint here" in fails(checkpoint=tmp_path / "empty")
    assert "nowhere: does not exist; give a run" in fails(checkpoint=tmp_path / "nowhere")
    assert "nowhere does not exist" in fails(data=tmp_path / "nowhere")
    assert "no audio file" in fails(data=tmp_path / "empty")
    assert "shorter than --min-frames 1000" in fails("--min-frames", 1000)
    assert "--at: 'x' is not a whole number" in fails("--at", "2000,x")
    assert "--at: 0 is not allowed" in fails("--at", "0")
    assert "--at: '' is not a whole number" in fails("--at", "2000,")
    assert "--half-width: 0 is not allowed" in fails("--half-width", 0)
    assert "--chunk-frames: 0 is not allowed" in fails("--chunk-frames", 0)
    assert "--max-failures: -1 is not allowed" in fails("--max-failures=-1")
    assert "leave out --ttt off" in fails("--compare", "--ttt", "off")
    assert "use --ttt on" in fails("--trajectories", "--ttt", "off")
    assert "has no TTT layers" in fails("--trajectories", mode="lora")
    assert "invalid choice: 'loud'" in fails("--user", "loud")
    assert "--out: " in (line := fails(out="file")) and "is a file" in line
    assert "cannot be written" in fails(out="file/below")
    assert "cannot be written" in fails("--out", "/proc/nowhere/out")
    assert "File name too long" in fails("--out", "n" * 300)
    assert "--out: is empty" in fails("--out", "")
    assert "--data: is empty" in fails("--data", "")
    assert "unrecognized arguments: --greedy" in fails("--greedy")
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: evaluate(["short-context"]))
    assert exit_.value.code == 2


def test_the_checkpoints_own_folder_takes_results_where_there_is_no_run(command, untrained_run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint_content(untrained_run("full_ttt")).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    status, _, errors = command(checkpoint=copy, out=None)
    assert (status, errors) == (0, [])
    (folder,) = (copy / "evaluation" / "long_context").iterdir()
    assert (folder / "results.json").is_file()


def test_the_script_runs_as_a_process():
    command = [sys.executable, "evaluate.py", "long-context", "--data", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --checkpoint: give a trained model, or --base alone for a base model as it is (see --help).\n"
    )
