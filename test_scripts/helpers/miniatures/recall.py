"""Miniature folders of items for tests of `evaluate.py recall`."""

import json
from pathlib import Path

import numpy as np
import sphn

RATE = 24_000


def write_recording(path: Path, *, num_frames: int, seed: int, words: list[str]) -> None:
    """Stereo tones of random pitch, and a word of Moshi every second frame."""
    generator = np.random.default_rng(seed)
    time = np.arange(1920) / RATE
    pitch = generator.uniform(80, 4000, size=(2, num_frames, 1))
    audio = 0.5 * np.sin(2 * np.pi * pitch * time).reshape(2, -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sphn.write_wav(str(path), audio.astype(np.float32), RATE)
    timed = [[word, [0.16 * n, 0.16 * n + 0.1], "SPEAKER_MAIN"] for n, word in enumerate(words)]
    path.with_suffix(".json").write_text(json.dumps({"alignments": timed}))


def write_items(folder: Path, *, num_groups: int = 3, num_plants: int = 2) -> Path:
    """Groups of random sound, said by Moshi and by the user in turn."""
    seed, lines = 0, []
    for number in range(2):
        write_recording(folder / "filler" / f"{number}.wav", num_frames=20, seed=1000 + number, words=["so"])
    for group in range(num_groups):
        paths: dict[str, list[str]] = {"plant": [], "answer": [], "cue": []}
        for kind in [*(("plant", "answer") * num_plants), "cue"]:
            path = f"{group}/{kind}{len(paths[kind])}.wav"
            write_recording(folder / path, num_frames=3 + seed % 3, seed=seed, words=["yes", "no"])
            paths[kind].append(path)
            seed += 1
        lines.append(
            {
                "id": f"group{group}",
                "kind": "name" if group % 2 else "place",
                "said_by": "user" if group % 2 else "moshi",
                "plants": paths["plant"],
                "cue": paths["cue"][0],
                "answers": paths["answer"],
            }
        )
    (folder / "recall.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
