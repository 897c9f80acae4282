"""Recordings with transcripts for tests of annotate.py, and its command line in this process."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest

from finetune.annotation.command import annotate
from finetune.commands import run_command

SPEAKERS = {"left": "SPEAKER_MAIN", "right": "SPEAKER_USER"}


def run_annotate(capsys, *arguments) -> tuple[int, str, list[str]]:
    """Run annotate.py's work; exit status, output and error lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: annotate([str(part) for part in arguments]))
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err.splitlines()


def read_words(path: Path, channel: str) -> list[tuple[str, float, float]]:
    """The words of one channel in a file of word timings, as (text, start_sec, end_sec)."""
    alignments = json.loads(path.read_text())["alignments"]
    return [(text, *span) for text, span, speaker in alignments if speaker == SPEAKERS[channel]]


def write_transcripts(wav_path: Path, texts: dict[str, str]) -> None:
    """`name.left.txt` and `name.right.txt` beside a recording."""
    for channel, text in texts.items():
        wav_path.with_suffix(f".{channel}.txt").write_text(text, encoding="utf-8")


def write_wav(path: Path, samples: np.ndarray, *, sample_rate: int = 24_000) -> Path:
    """Write `[channels, num_samples]` in -1..1 as 16 bits; returns the path."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(np.round(samples.T * 32767).astype("<i2").tobytes())
    return path


def read_wav(path: Path) -> np.ndarray:
    """`[channels, num_samples]` of a 16-bit file."""
    with wave.open(str(path), "rb") as file:
        data = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return data.reshape(-1, file.getnchannels()).T / 32767
