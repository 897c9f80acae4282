"""annotate.py with Whisper, with a stand-in for the package that does not run here."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from annotation_helpers import read_words, run_annotate, write_wav
from finetune.annotation.engines import EngineSettings


class StandIn(ModuleType):
    """Answers as whisper_timestamped does, and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__("whisper_timestamped")
        self.loaded: list[tuple[str, str]] = []
        self.calls: list[tuple[np.ndarray, dict]] = []
        self.fails_at = -1

    def load_model(self, name: str, device: str) -> str:
        if name == "nonsense":
            raise RuntimeError("Model nonsense not found; available models = ['tiny', 'base']")
        self.loaded.append((name, device))
        return f"{name} on {device}"

    def transcribe(self, model: str, audio: np.ndarray, **options) -> dict:
        assert model == "medium on cpu"
        self.calls.append((audio, options))
        if len(self.calls) - 1 == self.fails_at:
            raise AssertionError("Inconsistent number of segments")
        offset = float(np.flatnonzero(audio)[0] / 16_000)
        first = {"text": " Hello,", "start": offset, "end": offset + 0.25, "confidence": 0.9}
        second = {"text": "you", "start": offset + 0.5, "end": offset + 0.75, "confidence": 0.8}
        nothing = {"text": " ", "start": offset + 0.8, "end": offset + 0.8, "confidence": 0.1}
        return {"text": "Hello, you", "segments": [{"words": [first, nothing]}, {}, {"words": [second]}]}


@pytest.fixture
def whisper(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "whisper_timestamped", stand_in)
    return stand_in


@pytest.fixture
def recordings(tmp_path):
    """Two recordings: the left channel begins after 1 s, the right one after 2 s."""
    samples = np.full((2, 16_000 * 4), 0.1)
    samples[0, :16_000] = samples[1, :32_000] = 0.0
    for name in ("a.wav", "b.wav"):
        write_wav(tmp_path / name, samples, sample_rate=16_000)
    return tmp_path


def test_both_channels_are_transcribed_at_16_khz_with_speech_cut_out(whisper, recordings, capsys):
    status, output, _ = run_annotate(capsys, recordings, "--device", "cpu")
    assert (status, whisper.loaded) == (0, [("medium", "cpu")])
    assert output == "2 recordings: 2 annotated, 0 skipped (annotated before), 0 rejected\n"
    assert len(whisper.calls) == 4
    for audio, options in whisper.calls:
        assert (audio.dtype, audio.shape) == (np.float32, (64_000,))
        assert (options["language"], options["vad"]) == ("en", "auditok")
    assert read_words(recordings / "a.json", "left") == [("Hello,", 1.0, 1.25), ("you", 1.5, 1.75)]
    assert read_words(recordings / "a.json", "right") == [("Hello,", 2.0, 2.25), ("you", 2.5, 2.75)]


def test_the_language_can_be_found_out(whisper, recordings, capsys):
    assert run_annotate(capsys, recordings, "--device", "cpu", "--language", "auto")[0] == 0
    assert [options["language"] for _, options in whisper.calls] == [None] * 4


def test_a_silent_channel_is_not_transcribed(whisper, recordings, capsys):
    samples = np.full((2, 32_000), 0.1) * [[1.0], [0.0]]
    write_wav(recordings / "a.wav", samples, sample_rate=16_000)
    (recordings / "b.wav").unlink()
    assert run_annotate(capsys, recordings, "--device", "cpu")[0] == 0
    assert len(whisper.calls) == 1


def test_a_recording_at_which_whisper_fails_is_listed_and_the_next_is_done(whisper, recordings, capsys):
    whisper.fails_at = 1
    status, output, _ = run_annotate(capsys, recordings, "--device", "cpu")
    assert status == 1
    reason = "right channel: whisper failed (AssertionError: Inconsistent number of segments)."
    assert output.splitlines()[1:] == [f"rejected {recordings / 'a.wav'}: {reason}"]
    assert [path.name for path in recordings.glob("*.json")] == ["b.json"]


def test_workers_are_spread_over_the_gpus(whisper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for worker in range(3):
        EngineSettings("whisper").build(worker)
    EngineSettings("whisper", device="cuda:1").build(0)
    assert [device for _, device in whisper.loaded] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--device: cuda: 0 GPUs are seen; --device cpu does without, slowly."),
        (("--device", "gpu"), "--device: 'gpu' is not a device"),
        (("--device", "cpu", "--whisper-model", "nonsense"), "--whisper-model: nonsense cannot be loaded"),
    ],
)
def test_what_cannot_run_ends_with_one_line(whisper, recordings, options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, _, errors = run_annotate(capsys, recordings, *options)
    assert status == 2
    assert [line for line in errors if line.startswith("error:")] == errors[-1:]
    assert message in errors[-1]
    assert not list(recordings.glob("*.json"))


def test_without_the_package_it_says_what_to_install(recordings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_timestamped", None)
    status, _, errors = run_annotate(capsys, recordings)
    assert status == 2
    assert "pip install 'moshi-ttt[annotate-whisper]'" in errors[-1]
    assert "--engine pocketsphinx" in errors[-1]
