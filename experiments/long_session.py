"""A conversation of many hours: do memory, latency and fast weights stay as they are?

    python -m experiments.long_session --checkpoint runs/quickstart --audio demo_assets/data/eval/*.wav \
        --steps 100000 --out runs/long_session

The model hears the recordings over and over, speaks with its own draws, and is never reset. Written to the
output folder: `curve.csv` (growth of the fast weights, resident memory, latency), `summary.json` and
`curve.png`. `--state-decay 0.01` shows the same with forgetting. At the end the old conversation and a new
one take turns, so that their latencies are compared on the same machine in the same minute.
"""

import argparse
import csv
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from moshi.modules.streaming import StreamingModule
from torch import Tensor

from finetune.commands import Parser, run_command
from finetune.data.audio.read import read_voice
from finetune.inference.conversation import Conversation
from finetune.inference.options import positive_integer
from finetune.inference.speech_model import SpeechModel, load_speech_model
from moshi_ttt.hybrid_model import streaming_states, ttt_layers
from moshi_ttt.memory import fast_weight_drift

WINDOW = 1000  # steps at the start and at the end whose latencies are compared


def main() -> int:
    """Run the session, and write what was measured."""
    options = _parse()
    torch.set_num_threads(options.threads)
    speech = load_speech_model(options.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    if options.state_decay is not None:
        for layer in ttt_layers(speech.lm).values():
            layer.config = dataclasses.replace(layer.config, state_decay=options.state_decay)
    options.out.mkdir(parents=True, exist_ok=True)
    rows, wall, cpu, ratio = _run(speech, options)
    _write_curve(options.out, rows)
    summary = _summary(options, rows, wall, cpu) | {"latency_old_over_new": ratio}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _plot(options.out, rows)
    print(json.dumps(summary, indent=2))
    return 0


def _run(
    speech: SpeechModel, options: argparse.Namespace
) -> tuple[list[dict[str, float]], np.ndarray, np.ndarray, float]:
    """A record every `--every` steps, wall and CPU seconds of every step, and `_old_over_new`."""
    wall, cpu = np.zeros(options.steps), np.zeros(options.steps)
    rows: list[dict[str, float]] = []
    frames = _endless_frames(speech, options.audio)
    with Conversation(speech.lm, speech.mimi) as conversation:
        conversation.warm_up()
        conversation.start(seed=0)
        for step in range(options.steps):
            frame = next(frames)
            start = time.perf_counter(), time.process_time()
            reply = conversation.listen(frame)
            wall[step], cpu[step] = time.perf_counter() - start[0], time.process_time() - start[1]
            assert reply.audio.isfinite().all(), f"audio is not finite at step {step}"
            if (step + 1) % options.every == 0:
                rows.append(_record(conversation, step + 1, wall, options.every))
                if len(rows) % 50 == 0:
                    print(rows[-1], file=sys.stderr, flush=True)
        resets = conversation.check_memory()
        ratio = _old_over_new(conversation, frames)
    assert resets == 0, f"{resets} rows were reset"
    return rows, wall, cpu, ratio


def _old_over_new(old: Conversation, frames: Iterator[Tensor], *, num_frames: int = 500) -> float:
    """Ratio of the median latencies of a conversation and a new one, which take turns frame by frame."""
    modules: tuple[StreamingModule, ...] = (old.lm, old.mimi)
    states = {old: [module.get_streaming_state() for module in modules]}
    for module in modules:
        module._stop_streaming()
    with Conversation(old.lm, old.mimi) as new:
        states[new] = [module.get_streaming_state() for module in modules]
        seconds: dict[Conversation, list[float]] = {old: [], new: []}
        for number in range(num_frames):
            frame = next(frames)
            for conversation in (old, new) if number % 2 else (new, old):
                for module, state in zip(modules, states[conversation], strict=True):
                    module.set_streaming_state(state)
                start = time.perf_counter()
                conversation.listen(frame)
                seconds[conversation].append(time.perf_counter() - start)
    return float(np.median(seconds[old]) / np.median(seconds[new]))


def _record(conversation: Conversation, step: int, wall: np.ndarray, every: int) -> dict[str, float]:
    row = {"step": step, "rss_mb": _resident_mb()}
    row["latency_ms"] = float(np.median(wall[step - every : step])) * 1000
    for index, state in streaming_states(conversation.lm).items():
        row[f"drift_layer_{index}"] = fast_weight_drift(state).item()
        norms = [weight.square().sum() for weight in state.buffers.start_weights]
        row[f"norm_layer_{index}"] = torch.stack(norms).sum().sqrt().item()
    return row


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _endless_frames(speech: SpeechModel, paths: list[Path]) -> Iterator[Tensor]:
    size = speech.mimi.frame_size
    voices = [torch.from_numpy(read_voice(path, sample_rate=int(speech.mimi.sample_rate))) for path in paths]
    for voice in cycle(voices):
        yield from (frame[None] for frame in voice.split(size) if len(frame) == size)


def _summary(
    options: argparse.Namespace, rows: list[dict[str, float]], wall: np.ndarray, cpu: np.ndarray
) -> dict[str, Any]:
    window = min(WINDOW, options.steps // 2)
    settled = [row for row in rows if row["step"] >= options.steps // 10]
    rss = [row["rss_mb"] for row in settled]
    steps = np.log([row["step"] for row in settled])
    drifts = [key for key in rows[0] if key.startswith("drift")]
    return {
        "steps": options.steps,
        "hours_of_audio": options.steps / 12.5 / 3600,
        "threads": options.threads,
        "state_decay": options.state_decay,
        "latency_first_ms": float(np.median(wall[:window])) * 1000,
        "latency_last_ms": float(np.median(wall[-window:])) * 1000,
        "latency_ratio": float(np.median(wall[-window:]) / np.median(wall[:window])),
        "cpu_first_ms": float(np.median(cpu[:window])) * 1000,
        "cpu_last_ms": float(np.median(cpu[-window:])) * 1000,
        "cpu_ratio": float(np.median(cpu[-window:]) / np.median(cpu[:window])),
        "rss_after_a_tenth_mb": rss[0],
        "rss_last_mb": rss[-1],
        "rss_ratio": max(rss) / min(rss),
        # drift ~ step ** exponent over the last nine tenths: below 1 is sub-linear, 0 is flat
        "growth_exponent": {
            key: float(np.polyfit(steps, np.log([row[key] for row in settled]), 1)[0]) for key in drifts
        },
        "drift_last": {key: rows[-1][key] for key in drifts},
    }


def _write_curve(out: Path, rows: list[dict[str, float]]) -> None:
    with (out / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _plot(out: Path, rows: list[dict[str, float]]) -> None:
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for key in (key for key in rows[0] if key.startswith("drift")):
        axes[0].plot(steps, [row[key] for row in rows], label=key.removeprefix("drift_").replace("_", " "))
    axes[0].legend()
    panels = (
        ("change of the fast weights, |W - W0| / |W0|", ""),
        ("resident memory, MB", "rss_mb"),
        ("latency, ms per frame", "latency_ms"),
    )
    for axis, (title, key) in zip(axes, panels, strict=True):
        if key:
            axis.plot(steps, [row[key] for row in rows])
        axis.set(title=title, xlabel="frames", ylim=(0, 1.15 * axis.get_ylim()[1]))
    figure.savefig(out / "curve.png", dpi=110)


def _parse() -> argparse.Namespace:
    parser = Parser(prog="long_session.py", description="A conversation of many hours.")
    parser.add_argument("--checkpoint", required=True, help="run directory or checkpoint")
    parser.add_argument("--audio", nargs="+", type=Path, required=True, help="what the user says")
    parser.add_argument("--steps", type=positive_integer, default=100_000, help="frames (%(default)s)")
    parser.add_argument("--every", type=positive_integer, default=100, help="steps per record (%(default)s)")
    parser.add_argument("--threads", type=positive_integer, default=1, help="of torch (%(default)s)")
    parser.add_argument("--state-decay", type=float, help="forgetting per mini-batch, instead of the model's")
    parser.add_argument("--out", type=Path, default=Path("runs/long_session"), help="folder (%(default)s)")
    options = parser.parse_args()
    options.every = min(options.every, max(1, options.steps // 20))
    return options


if __name__ == "__main__":
    run_command(main)
