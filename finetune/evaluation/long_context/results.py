"""Scores of a measurement: by window, slope and position, each arm and the differences between arms."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.evaluation.long_context.measure import MeasuredRecording
from finetune.evaluation.long_context.statistics import (
    ONE_RECORDING,
    Bootstrap,
    Estimate,
    Window,
    bin_ratios,
    differences,
    mean_ratio,
    slope_ratio,
    thirds,
    window_ratio,
)
from moshi_ttt.files.atomic_file import replacing

METRICS = ("audio", "semantic", "acoustic", "text")
DEFINITIONS = {
    "audio": "mean cross-entropy of all codebooks that the model predicts, each weighs the same, in nats",
    "semantic": "that of the first codebook",
    "acoustic": "that of the other codebooks",
    "text": "that of the text token of each frame",
    "loss": "mean over all frames",
    "librilight_<n>k": "mean over the frames around position n thousand, of the recordings that reach it",
    "overall, early, middle, late": "least-squares slope in nats per 1,000 frames over the whole and its "
    "thirds, with one intercept per recording",
    "interval": "95 % percentile bootstrap over recordings",
}
LOSS, OVERALL = "loss", "overall"

Losses = Mapping[str, Mapping[str, Sequence[np.ndarray]]]  # arm -> metric -> [N] of each recording


@dataclass(frozen=True)
class ScoreSettings:
    """How losses become scores.

    Attributes:
        at: positions of the windows, in frames.
        half_width: of a window, in frames.
        bin_frames: frames of a line of positions.csv.
        num_resamples, seed: of the bootstrap.
    """

    at: tuple[int, ...]
    half_width: int
    bin_frames: int
    num_resamples: int
    seed: int

    def windows(self) -> list[Window]:
        """In order of position."""
        return [Window(centre, self.half_width) for centre in self.at]

    def bootstrap(self) -> Bootstrap:
        """With fresh draws."""
        return Bootstrap(self.num_resamples, seed=self.seed)


def losses_by_arm(recordings: Sequence[MeasuredRecording], arms: Sequence[str]) -> Losses:
    """The losses of all recordings, by arm and metric."""
    by_arm: dict[str, dict[str, list[np.ndarray]]] = {}
    for arm in arms:
        metrics = [recording.losses[arm].metrics() for recording in recordings]
        by_arm[arm] = {name: [each[name].numpy() for each in metrics] for name in METRICS}
    return by_arm


def score(losses: Losses, settings: ScoreSettings) -> dict[str, Any]:
    """All scores as a JSON object.

    Returns:
        `scores`: the audio loss in plain numbers, by arm; `details`: every metric with intervals and
        counts; `differences`: of the first arm to each other one on the same frames, by metric, negative
        where the first is better; `slope_ranges`: the frames of each slope.
    """
    bootstrap = settings.bootstrap()
    longest = max((len(x) for by_metric in losses.values() for x in by_metric["audio"]), default=0)
    ranges = {OVERALL: (0, longest)} | thirds(longest)
    details = {
        arm: {metric: _scores_of(x, settings, ranges, bootstrap) for metric, x in by_metric.items()}
        for arm, by_metric in losses.items()
    }
    first, *others = losses
    compared = {
        f"{first} - {other}": {
            metric: _means_of(differences(losses[first][metric], losses[other][metric]), settings, bootstrap)
            for metric in METRICS
        }
        for other in others
    }
    return {
        "scores": {arm: {k: e.value for k, e in by["audio"].items()} for arm, by in details.items()},
        "details": _as_json(details),
        "differences": _as_json(compared),
        "slope_ranges": {name: list(edges) for name, edges in ranges.items()},
        "definitions": DEFINITIONS,
    }


def _means_of(
    recordings: Sequence[np.ndarray], settings: ScoreSettings, bootstrap: Bootstrap
) -> dict[str, Estimate]:
    means = {LOSS: bootstrap.estimate(mean_ratio(recordings))}
    for window in settings.windows():
        means[window.name] = bootstrap.estimate(window_ratio(recordings, window))
    return means


def _scores_of(
    recordings: Sequence[np.ndarray],
    settings: ScoreSettings,
    ranges: Mapping[str, tuple[int, int]],
    bootstrap: Bootstrap,
) -> dict[str, Estimate]:
    slopes = {name: bootstrap.estimate(slope_ratio(recordings, *edges)) for name, edges in ranges.items()}
    return _means_of(recordings, settings, bootstrap) | slopes


def _as_json(value: Any) -> Any:
    if isinstance(value, Estimate):
        entry = value._asdict()
        if value.value is not None and value.interval is None:
            entry["note"] = ONE_RECORDING
        return entry
    return {key: _as_json(item) for key, item in value.items()}


def write_positions(path: Path, losses: Losses, bin_frames: int) -> None:
    """Mean losses by position as CSV; empty where there are none.

    Raises:
        OSError: the file cannot be written.
    """
    bootstrap = Bootstrap(num_resamples=1)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["start", "stop", "arm", *METRICS, "num_frames", "num_recordings"])
        for arm, by_metric in losses.items():
            bins = [bin_ratios(by_metric[metric], bin_frames) for metric in METRICS]
            for index, ratios in enumerate(zip(*bins, strict=True)):
                estimates = [bootstrap.estimate(ratio) for ratio in ratios]
                means = ["" if e.value is None else f"{e.value:.6f}" for e in estimates]
                start = index * bin_frames
                counts = (estimates[0].num_frames, estimates[0].num_recordings)
                writer.writerow([start, start + bin_frames, arm, *means, *counts])
