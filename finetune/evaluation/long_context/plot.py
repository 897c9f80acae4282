"""The picture of a measurement: losses by position, one line per arm, and their differences."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from moshi.models.loaders import FRAME_RATE

from finetune.evaluation.long_context.results import Losses
from finetune.evaluation.long_context.statistics import Bootstrap, bin_ratios, differences
from moshi_ttt.files.atomic_file import replacing

_NUM_POINTS = 100  # a line of more is noise


def plot_losses(path: Path, losses: Losses, bootstrap: Bootstrap) -> None:
    """Draw audio loss, and text loss where there is one, over position, with bands over recordings.

    Beside them, what the first arm has less or more than each other one on the same frames.

    Raises:
        OSError: the file cannot be written.
    """
    longest = max((len(x) for by_metric in losses.values() for x in by_metric["audio"]), default=0)
    width = max(1, -(-longest // _NUM_POINTS))
    shown = [
        metric
        for metric in ("audio", "text")
        if any(np.isfinite(x).any() for by_metric in losses.values() for x in by_metric[metric])
    ]
    first, *others = losses
    rows, columns = max(1, len(shown)), 2 if others else 1
    figure = Figure(figsize=(9 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, metric in zip(grid, shown, strict=False):
        for arm, by_metric in losses.items():
            _plot_line(axes[0], by_metric[metric], width, bootstrap, label=arm)
        _label(axes[0], f"{metric} loss (nats)", width)
        for number, other in enumerate(others, start=1):
            paired = differences(losses[first][metric], losses[other][metric])
            label = f"{first} - {other}"
            _plot_line(axes[1], paired, width, bootstrap, label=label, color=f"C{number}")
        if others:
            axes[1].axhline(0, color="grey", linewidth=0.8)
            _label(axes[1], f"difference of {metric} loss (nats)", width)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _label(axes: Axes, ylabel: str, width: int) -> None:
    axes.set_xlabel(f"frame (means of {width:,})")
    axes.set_ylabel(ylabel)
    minutes = axes.secondary_xaxis(
        "top",
        functions=(lambda x: np.asarray(x) / FRAME_RATE / 60, lambda x: np.asarray(x) * FRAME_RATE * 60),
    )
    minutes.set_xlabel("minutes")
    axes.legend()


def _plot_line(
    axes: Axes,
    recordings: Sequence[np.ndarray],
    width: int,
    bootstrap: Bootstrap,
    *,
    label: str,
    color: str | None = None,
) -> None:
    estimates = [bootstrap.estimate(ratio) for ratio in bin_ratios(recordings, width)]
    centres = (np.arange(len(estimates)) + 0.5) * width
    values = [np.nan if e.value is None else e.value for e in estimates]
    (line,) = axes.plot(centres, values, label=label, color=color)
    bands = [(np.nan, np.nan) if e.interval is None else e.interval for e in estimates]
    if np.isfinite(bands).any():
        axes.fill_between(centres, *np.transpose(bands), color=line.get_color(), alpha=0.2, linewidth=0)
