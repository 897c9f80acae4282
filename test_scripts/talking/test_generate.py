"""generate.py: recordings in and out, memory and sessions, comparisons, and a user's mistakes."""

import json
import signal
import sys
from functools import partial

import numpy as np
import pytest
import sphn

from finetune.inference.command import generate
from finetune.inference.conversation import Conversation
from run_helpers import checkpoint_content

RATE = 24000


@pytest.fixture
def run_generate(command):
    """Run the command in this process; return its status, output and error lines."""
    return partial(command, generate)


@pytest.fixture
def user(tmp_path):
    """2.9 s of noise in a mono file of 16 kHz: 36.25 frames."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(int(2.9 * 16000)).astype(np.float32)
    sphn.write_wav(str(tmp_path / "user.wav"), samples, 16000)
    return tmp_path / "user.wav"


@pytest.fixture
def talk(run_generate, untrained_run, user, tmp_path):
    """Run the command with a good checkpoint and recording; return the report."""

    def run(*options, mode="lora_ttt", recording=None, out="out.wav"):
        arguments = ("--checkpoint", untrained_run(mode), recording or user, tmp_path / out)
        status, output, errors = run_generate(*arguments, "--report", tmp_path / "report.json", *options)
        assert (status, errors) == (0, []), output
        return json.loads((tmp_path / "report.json").read_text()) | {"output": output}

    return run


def read(path):
    samples, rate = sphn.read(str(path))
    assert rate == RATE
    return samples


def test_the_conversation_is_written_in_stereo_with_times_and_text(talk, tmp_path):
    report = talk()
    audio = read(tmp_path / "out.wav")
    assert audio.shape == (2, 37 * 1920)
    model, heard = audio
    assert np.abs(model).max() > 0
    assert np.abs(heard[: int(2.9 * RATE)]).max() > 0 and not heard[int(2.9 * RATE) + 100 :].any()
    assert (report["num_frames"], report["frame_ms"]) == (37, 80.0)
    assert report["audio_sec"] == pytest.approx(37 * 0.08)
    assert 0 < report["latency_median_ms"] <= report["latency_p99_ms"] <= report["latency_max_ms"]
    assert report["real_time_factor"] == pytest.approx(report["compute_sec"] / report["audio_sec"])
    assert report["text"][0] in report["output"].replace("\n", " ")
    assert "real-time factor" in report["output"] and "of 80 ms" in report["output"]
    assert "attention window 25 and 500 frames" in report["output"]


def test_the_right_channel_of_a_stereo_file_is_the_user(talk, user, tmp_path):
    mono = sphn.read(str(user), sample_rate=RATE)[0][0]
    sphn.write_wav(str(tmp_path / "stereo.wav"), np.stack([np.ones_like(mono) * 0.5, mono]), RATE)
    sphn.write_wav(str(tmp_path / "mono.wav"), mono, RATE)
    talk(recording=tmp_path / "stereo.wav", out="a.wav")
    talk(recording=tmp_path / "mono.wav", out="b.wav")
    assert np.array_equal(read(tmp_path / "a.wav"), read(tmp_path / "b.wav"))


def test_the_seed_decides_and_rows_of_a_batch_draw_apart(talk, tmp_path):
    for name, options in {"a": (), "b": (), "c": ("--seed", 1)}.items():
        talk(*options, out=f"{name}.wav")
    a, b, c = (read(tmp_path / f"{name}.wav") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    report = talk("--batch-size", 2, out="batch.wav")
    assert len(report["text"]) == 2
    rows = [read(tmp_path / f"batch-{row}.wav") for row in range(2)]
    assert not np.array_equal(rows[0][0], rows[1][0]) and np.array_equal(rows[0][1], rows[1][1])


def test_modes_of_the_memory_are_different_models(talk, tmp_path):
    answers = {}
    for mode in ("on", "frozen", "off"):
        assert talk("--greedy", "--ttt", mode)["ttt"] == mode
        answers[mode] = read(tmp_path / "out.wav")[0]
    assert not np.array_equal(answers["on"], answers["frozen"])
    assert not np.array_equal(answers["frozen"], answers["off"])


def test_fused_adapters_say_the_same(talk, tmp_path):
    talk("--greedy")
    fused = read(tmp_path / "out.wav")
    talk("--greedy", "--no-fuse-lora")
    assert np.array_equal(read(tmp_path / "out.wav"), fused)


def test_two_halves_with_a_session_equal_the_whole(talk, user, tmp_path):
    whole = sphn.read(str(user), sample_rate=RATE)[0][0][: 36 * 1920]
    for name, part in {"whole": whole, "first": whole[: 19 * 1920], "second": whole[19 * 1920 :]}.items():
        sphn.write_wav(str(tmp_path / f"{name}.wav"), part, RATE)
    session = tmp_path / "session.safetensors"
    talk(recording=tmp_path / "whole.wav", out="all.wav")
    talk("--save-session", session, recording=tmp_path / "first.wav", out="a.wav")
    talk("--load-session", session, recording=tmp_path / "second.wav", out="b.wav")
    halves = np.concatenate([read(tmp_path / "a.wav"), read(tmp_path / "b.wav")], 1)
    assert np.array_equal(halves, read(tmp_path / "all.wav"))


def test_memory_changes_what_the_model_says_later(talk, tmp_path):
    memory = tmp_path / "memory.safetensors"
    talk("--greedy", "--save-memory", memory, out="a.wav")
    report = talk("--greedy", "--load-memory", memory, "--batch-size", 2, out="b.wav")
    assert f"memory: starts from {memory}" in report["output"]
    first, later = read(tmp_path / "a.wav"), read(tmp_path / "b-1.wav")
    assert np.array_equal(first[1], later[1]) and not np.array_equal(first[0], later[0])


def test_an_interrupted_run_writes_what_it_has(talk, monkeypatch, tmp_path):
    original = Conversation.listen

    def interrupt(self, audio):
        if self.num_frames == 10:
            signal.raise_signal(signal.SIGINT)
        return original(self, audio)

    monkeypatch.setattr(Conversation, "listen", interrupt)
    report = talk("--save-memory", tmp_path / "m.safetensors")
    assert "interrupted after 11 of 37 frames" in report["output"]
    assert read(tmp_path / "out.wav").shape == (2, 11 * 1920)
    assert (tmp_path / "m.safetensors").is_file()


@pytest.fixture
def fails(run_generate, untrained_run, user, tmp_path):
    """Run the command with a mistake; return its one line, after a look that nothing was written."""

    def run(*options, mode="lora_ttt", recording=None, out=None, checkpoint=None):
        before = sorted(tmp_path.rglob("*"))
        arguments = (checkpoint or untrained_run(mode), recording or user, out or tmp_path / "out.wav")
        status, _, errors = run_generate("--checkpoint", *arguments, *options)
        assert (status, len(errors)) == (2, 1), errors
        assert sorted(tmp_path.rglob("*")) == before
        return errors[0]

    return run


def test_mistakes_are_one_line(fails, tmp_path, user):
    (tmp_path / "noise.wav").write_bytes(b"noise")
    (tmp_path / "folder").mkdir()
    assert "nowhere.wav does not exist" in fails(recording="nowhere.wav")
    assert "noise.wav: cannot be read as audio" in fails(recording=tmp_path / "noise.wav")
    assert "its name must end with .wav" in fails(out=tmp_path / "out.mp3")
    assert "cannot be written: No such file" in fails(out=tmp_path / "nowhere" / "out.wav")
    assert "File name too long" in fails(out=tmp_path / f"{'n' * 300}.wav")
    assert "File name too long" in fails(recording="n" * 300)
    assert "File name too long" in fails(checkpoint="n" * 300)
    assert "two lines" in fails(checkpoint="two\nlines")
    assert "no checkpoint here" in fails(checkpoint=tmp_path / "folder")
    assert "device: 'gpu' is not a device" in fails("--device", "gpu")
    assert "invalid choice: 'float8'" in fails("--dtype", "float8")
    assert "invalid choice: 'sleep'" in fails("--ttt", "sleep")
    assert "--batch-size: 0 is not allowed" in fails("--batch-size", 0)
    assert "--batch-size: 'x' is not a whole number" in fails("--batch-size", "x")
    assert "--temp" in fails("--temp", "-1") and "--temp" in fails("--temp", "nan")
    assert "--seed: -3 is not allowed" in fails("--seed", -3)
    assert "--seed" in fails("--seed", 2**70)
    assert "unrecognized arguments: --temprature" in fails("--temprature", 1)
    assert "nowhere.safetensors: does not exist" in fails("--load-memory", tmp_path / "nowhere.safetensors")
    assert "cannot be read as safetensors" in fails("--load-session", tmp_path / "noise.wav")
    assert "give one of the two" in fails("--load-session", user, "--load-memory", user)
    assert "--save-memory: with --ttt frozen the memory does not learn" in fails(
        "--ttt", "frozen", "--save-memory", tmp_path / "m"
    )
    assert "is a folder" in fails("--save-session", tmp_path / "folder")


def test_a_checkpoint_without_ttt_talks_but_has_no_memory(talk, fails, tmp_path):
    assert "no TTT layers" in talk(mode="lora")["output"]
    (tmp_path / "report.json").unlink(), (tmp_path / "out.wav").unlink()
    assert "has no TTT layers, so there is no memory" in fails("--save-memory", tmp_path / "m", mode="lora")
    assert "--ttt frozen" in fails("--ttt", "frozen", mode="lora")


def test_half_precision_talks_on_a_cpu(talk):
    report = talk("--dtype", "bfloat16", "--greedy")
    assert (report["dtype"], report["memory_resets"]) == ("bfloat16", 0)


def test_nothing_but_older_outputs_is_overwritten(fails, talk, user, tmp_path, untrained_run):
    m = tmp_path / "m.safetensors"
    twice = "names another file of this command too"
    assert twice in fails(out=user)
    assert twice in fails("--save-memory", user)
    assert twice in fails("--save-memory", m, "--save-session", m)
    assert twice in fails("--save-memory", tmp_path / "out.wav")
    assert twice in fails("--load-memory", m, "--save-session", m)
    assert "its name must end with .json" in fails("--report", user)
    (tmp_path / "user-1.wav").symlink_to(user)
    assert twice in fails("--batch-size", 2, out=tmp_path / "user.wav")
    precious = checkpoint_content(untrained_run("lora_ttt")) / "ttt.safetensors"
    assert "exists and is not moshi-ttt memory 1" in fails("--save-memory", precious)
    assert "exists and is not moshi-ttt session 1" in fails("--save-session", precious)
    (tmp_path / "b-1.wav").mkdir()
    assert "b-1.wav: is a folder" in fails("--batch-size", 2, out=tmp_path / "b.wav")
    assert "cannot be written" in fails("--save-memory", "/proc/memory")
    talk("--save-memory", m)
    talk("--load-memory", m, "--save-memory", m)


def test_a_reader_that_leaves_does_not_end_the_conversation(talk, monkeypatch, tmp_path):
    class Broken:
        def write(self, _):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken())
        talk("--save-memory", tmp_path / "m.safetensors")
    assert read(tmp_path / "out.wav").shape == (2, 37 * 1920)
    assert (tmp_path / "m.safetensors").is_file()
