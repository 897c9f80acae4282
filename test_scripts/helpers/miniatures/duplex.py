"""A miniature Full-Duplex-Bench, and outputs of models whose behaviour is known by construction."""

import json
from pathlib import Path

import numpy as np
import sphn

RATE = 24000
SECONDS = 12.0
NUM_SAMPLES = 3
PAUSE = (4.0, 5.0)
TURN_END = 6.0
INTERRUPTION = (4.0, 6.0)
# Seconds at which each model speaks, by the set's name.
SETS = ("candor_pause_handling", "candor_turn_taking", "synthetic_user_interruption", "icc_backchannel")
WAITS: dict[str, list[tuple[float, float]]] = {name: [] for name in SETS}
INTERRUPTS = {name: [(0.0, SECONDS)] for name in SETS}
ANSWERS = {
    "candor_pause_handling": [],
    "candor_turn_taking": [(TURN_END + 0.5, 10.0)],
    # It was speaking, stops 0.5 s after the user began, and answers 0.5 s after the user's end.
    "synthetic_user_interruption": [(1.0, INTERRUPTION[0] + 0.5), (INTERRUPTION[1] + 0.5, 10.0)],
    "icc_backchannel": [(2.0, 2.4), (8.0, 8.4)],
}


def write_bench(root: Path, *, seconds: float = SECONDS, num_samples: int = NUM_SAMPLES) -> Path:
    """The four sets of the benchmark's v1; times are scaled with the length of a sample."""
    scale = seconds / SECONDS
    annotations = {
        "candor_pause_handling": ("pause.json", [{"text": "[PAUSE]", "timestamp": _scaled(PAUSE, scale)}]),
        "candor_turn_taking": (
            "turn_taking.json",
            [{"text": "[TURN-TAKING]", "timestamp": _scaled((TURN_END, TURN_END + 0.4), scale)}],
        ),
        "synthetic_user_interruption": (
            "interrupt.json",
            [{"context": "Tell me.", "interrupt": "Wait.", "timestamp": _scaled(INTERRUPTION, scale)}],
        ),
        "icc_backchannel": (None, None),
    }
    for name, (file, content) in annotations.items():
        for number in range(num_samples):
            folder = root / name / str(number)
            folder.mkdir(parents=True)
            _write(folder / "input.wav", [(0.0, seconds / 2)], seconds=seconds, seed=number)
            if file is not None:
                (folder / file).write_text(json.dumps(content))
    return root


def write_outputs(
    root: Path, spoken: dict, *, seconds: float = SECONDS, num_samples: int = NUM_SAMPLES
) -> Path:
    """Outputs of a model that speaks at these times: their sound, and a word of every half second."""
    for name, unscaled in spoken.items():
        intervals = [_scaled(interval, seconds / SECONDS) for interval in unscaled]
        for number in range(num_samples):
            folder = root / name / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "output.wav", intervals, seconds=seconds, seed=number)
            write_words(folder / "output.json", intervals)
    return root


def write_words(path: Path, intervals) -> None:
    """`output.json` as the benchmark's recogniser writes it."""
    words = []
    for start, end in intervals:
        for begin in np.arange(start, end - 0.1, 0.5):
            words.append({"text": "word", "timestamp": [float(begin), float(min(begin + 0.5, end))]})
    path.write_text(json.dumps({"text": " ".join(word["text"] for word in words), "chunks": words}))


def voice(intervals, *, seconds: float, seed: int = 0) -> np.ndarray:
    """Noise at -20 dB in these intervals, and at -70 dB between them."""
    generator = np.random.default_rng(seed)
    level = np.full(round(seconds * RATE), 10 ** (-70 / 20))
    for start, end in intervals:
        level[round(start * RATE) : round(end * RATE)] = 0.1
    return (level * generator.standard_normal(len(level))).astype(np.float32)


def _write(path: Path, intervals, *, seconds: float, seed: int) -> None:
    sphn.write_wav(str(path), voice(intervals, seconds=seconds, seed=seed), RATE)


def _scaled(times, scale: float) -> list[float]:
    return [time * scale for time in times]
