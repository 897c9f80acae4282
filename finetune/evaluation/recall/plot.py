"""The picture of a measurement: right answers over the lag, a line per arm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from moshi.models.loaders import FRAME_RATE

from moshi_ttt.files.atomic_file import replacing

_SHOWN = {"text": "words", "audio": "all codebooks"}


def plot_accuracy(path: Path, arms: Mapping[str, Mapping[str, Any]], lags: Sequence[int]) -> None:
    """Draw accuracies with their intervals, words and sound beside each other, and chance.

    Args:
        path: of the PNG file.
        arms: summaries by arm or model, see `finetune.evaluation.recall.results.summaries`.
        lags: in frames.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    seconds = [lag / FRAME_RATE for lag in lags]
    for axes, (measure, title) in zip(figure.subplots(1, 2, sharey=True), _SHOWN.items(), strict=True):
        for color, (arm, summary) in enumerate(arms.items()):
            entries = [summary[str(lag)][measure] for lag in lags]
            values = [100 * entry["accuracy"] for entry in entries]
            axes.plot(seconds, values, color=f"C{color}", marker="o", markersize=3, label=arm)
            if all(entry["interval"] is not None for entry in entries):
                low, high = ([100 * entry["interval"][end] for entry in entries] for end in (0, 1))
                axes.fill_between(seconds, low, high, color=f"C{color}", alpha=0.15, linewidth=0)
        for entry in (next(iter(arms.values()))[str(lag)][measure] for lag in lags[:1]):
            axes.axhline(100 * entry["chance"], color="grey", linestyle=":", linewidth=0.8, label="chance")
        if len(lags) > 1:
            axes.set_xscale("log")
        axes.set_ylim(0, 102)
        axes.set_xlabel("lag (s)")
        axes.set_title(title)
    axes.legend()
    figure.axes[0].set_ylabel("right answers (%)")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
