"""Miniature spoken benchmarks in the layouts of the real ones."""

import csv
from pathlib import Path

import numpy as np
import sphn

from evaluation_helpers import run_evaluate

RATE = 24000
VOICES = ("A", "B")


def spoken_command(capsys, untrained_run, data: Path, tmp_path: Path):
    """Run a measurement in this process; returns its status, output and error lines."""

    def run(name, *options, mode="lora_ttt", folder=None, out="out", checkpoint=None):
        arguments = [name, "--data", folder or data]
        if "--compare" not in options:
            arguments += ["--checkpoint", checkpoint or untrained_run(mode)]
        if out is not None:
            arguments += ["--out", tmp_path / out]
        return run_evaluate(capsys, *arguments, *options)

    return run


def write_swuggy(root: Path, *, num_ids: int, seed: int = 0, swapped: bool = False) -> Path:
    """`lexical/dev` with words of two voices and two frequencies; correct and incorrect are alike in kind."""
    rows = [
        {"id": number, "voice": voice, "frequency": 3 if number % 2 else 200, "correct": correct}
        for number in range(num_ids)
        for voice in VOICES
        for correct in (1, 0)
    ]
    return _write_gold(root / "lexical" / "dev", rows, seed=seed, swapped=swapped)


def write_sblimp(root: Path, *, num_ids: int, seed: int = 1) -> Path:
    """`syntactic/dev` with sentences of two subtypes, of which each has the same ids."""
    rows = [
        {"id": number, "type": "agreement", "subtype": subtype, "voice": "A", "correct": correct}
        for subtype in ("noun", "verb")
        for number in range(num_ids // 2)
        for correct in (1, 0)
    ]
    return _write_gold(root / "syntactic" / "dev", rows, seed=seed)


def write_stories(folder: Path, *, num_ids: int, seed: int = 2) -> Path:
    """Stories called as in the release, of different lengths."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(num_ids):
        for index, mark in enumerate(("correct", "incorrect")):
            write_speech(folder / f"{2 * number + index}_{number}_{mark}.wav", generator, 10 + 3 * index)
    return folder


def write_speech(path: Path, generator: np.random.Generator, num_frames: int) -> None:
    """A tone of random pitch and loudness in each frame."""
    time = np.arange(1920) / RATE
    pitch = generator.uniform(80, 4000, size=(num_frames, 1))
    loudness = generator.uniform(0.05, 0.7, size=(num_frames, 1))
    audio = loudness * np.sin(2 * np.pi * pitch * time)
    sphn.write_wav(str(path), audio.flatten().astype(np.float32), RATE)


def _write_gold(folder: Path, rows: list[dict], *, seed: int, swapped: bool = False) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index, row in enumerate(rows):
        row["filename"] = f"item{index:03d}"
        write_speech(folder / f"item{index:03d}.wav", generator, int(generator.integers(6, 10)))
        if swapped:
            row["correct"] = 1 - row["correct"]
    with (folder / "gold.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["filename", *(name for name in rows[0] if name != "filename")])
        writer.writeheader()
        writer.writerows(rows)
    return folder
