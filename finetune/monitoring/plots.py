"""PNG plots of a run, drawn from its metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from finetune.monitoring.metrics_file import LogRecord, read_records

_SMOOTHED_FROM = 512  # frames


def plot_run(run_dir: Path) -> list[Path]:
    """Plot losses, learning rates and gates into `run_dir/plots`.

    Returns:
        The files written; a plot without data is left out.
    """
    train, evaluation = read_records(run_dir, "train"), read_records(run_dir, "eval")
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    written = [_plot_losses(train, evaluation, folder / "losses.png")]
    rates = [name for name in ("lr_base", "lr_ttt_weights", "lr_ttt_alpha") if _has(train, name)]
    written.append(_plot_lines(train, rates, folder / "rates.png", ylabel="learning rate", log=True))
    if _has(train, "ttt_alpha"):
        written.append(_plot_gates(train, folder / "gates.png"))
    return written


def plot_trajectories(losses: Mapping[int, Tensor], folder: Path, *, title: str) -> list[Path]:
    """Plot inner-loop trajectories, one file per layer: the losses, and what memory and step gain.

    Long ones are shown as they are, faintly, and as a running mean.

    Args:
        losses: by layer, `[3, T]`: at `W0`, before and after the frame's own step.
        folder: made if need be.
        title: said beside the layer.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _plot_trajectory(part, folder / f"inner_loss_layer_{index}.png", title=f"layer {index}, {title}")
        for index, part in losses.items()
    ]


def _plot_losses(train: Sequence[LogRecord], evaluation: Sequence[LogRecord], path: Path) -> Path:
    figure = Figure(figsize=(10, 4), layout="constrained")
    both = ("text_loss", "audio_loss")
    names = [name for name in both if any(name in record.values for record in train)] or both
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(*_series(train, name), alpha=0.6, label="training")
        if evaluation:
            axes.plot(*_series(evaluation, name), marker="o", label="held out")
        baseline = next(
            (r.values[f"unigram_{name}"] for r in evaluation if f"unigram_{name}" in r.values), None
        )
        if baseline is not None:
            axes.axhline(baseline, color="grey", linestyle="--", label="unigram")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{name.replace('_', ' ')} (nats)")
        axes.legend()
    return _save(figure, path)


def _plot_gates(train: Sequence[LogRecord], path: Path) -> Path:
    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = (
        ("gate_opening/", "mean |tanh(alpha)|"),
        ("ttt_delta/", "mean |alpha - start|"),
        ("ttt_alpha/", "mean tanh(alpha), of both signs"),
    )
    names = sorted({name for record in train for name in record.values})
    for axes, (prefix, label) in zip(figure.subplots(1, 3), panels, strict=True):
        lines = [name for name in names if name.startswith(prefix)]
        for name in lines:
            axes.plot(*_series(train, name), label=name.removeprefix(prefix).replace("_", " "))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if lines:  # the log of an older run has no gate_opening
            axes.legend()
    return _save(figure, path)


def _plot_trajectory(losses: Tensor, path: Path, *, title: str) -> Path:
    values = losses.double().numpy()
    at_w0, before, after = np.where(np.isfinite(values), values, np.nan)
    window = len(at_w0) // _SMOOTHED_FROM * 4 + 1
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    curves = (
        (panels[0], "W0", at_w0, "tab:grey"),
        (panels[0], "before the step", before, "tab:blue"),
        (panels[0], "after the step", after, "tab:orange"),
        (panels[1], "W0 - before", at_w0 - before, "tab:blue"),
        (panels[2], "before - after", before - after, "tab:orange"),
    )
    for axes, label, series, colour in curves:
        _plot_smoothed(axes, series, window, label=label, colour=colour)
    panels[0].set_title(title if window == 1 else f"{title} (running mean of {window} frames)")
    panels[-1].set_xlabel("frame")
    for axes, ylabel in zip(panels, ("inner loss", "gain over W0", "gain per step"), strict=True):
        axes.set_ylabel(ylabel)
        axes.legend()
    for axes in panels[1:]:
        axes.axhline(0, color="black", linewidth=0.5)
    return _save(figure, path)


def _plot_smoothed(axes: Axes, series: np.ndarray, window: int, *, label: str, colour: str) -> None:
    if window > 1:
        axes.plot(series, alpha=0.2, linewidth=0.5, color=colour)
        series = _running_mean(series, window)
    axes.plot(series, label=label, color=colour, linewidth=1)


def _running_mean(series: np.ndarray, window: int) -> np.ndarray:
    """Centred, shorter at the ends; NaN is left out, and stays where there is nothing else."""
    finite = np.isfinite(series)
    sums, counts = (np.concatenate([[0], np.cumsum(x)]) for x in (np.where(finite, series, 0), finite))
    frames = np.arange(len(series))
    start, stop = np.maximum(frames - window // 2, 0), np.minimum(frames + window // 2 + 1, len(series))
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / (counts[stop] - counts[start])


def _plot_lines(
    records: Sequence[LogRecord], names: Sequence[str], path: Path, *, ylabel: str, log: bool = False
) -> Path:
    figure, axes = _figure("step", ylabel)
    for name in names:
        axes.plot(*_series(records, name), label=name)
    if log:
        axes.set_yscale("log")
    if names:
        axes.legend()
    return _save(figure, path)


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _series(records: Sequence[LogRecord], name: str) -> tuple[list[int], list[float]]:
    points = [(step, value) for step, values in records if (value := values.get(name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _has(records: Sequence[LogRecord], name: str) -> bool:
    return any(name in record.values for record in records)
