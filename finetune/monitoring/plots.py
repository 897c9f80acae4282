"""PNG plots of a run, drawn from its metrics."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from finetune.monitoring.metrics import read_metrics

matplotlib.use("Agg")

INNER_LOSSES_FILE = "inner_loop_losses.jsonl"
_INNER_LABELS = ("W0", "before the step", "after the step")


def plot_run(run_dir: Path) -> list[Path]:
    """Plot losses, learning rates and gates into `run_dir/plots`.

    Returns:
        The files written; a plot without data is left out.
    """
    train, evaluation = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    written = [_plot_losses(train, evaluation, folder / "losses.png")]
    rates = [name for name in ("lr_base", "lr_ttt_weights", "lr_ttt_alpha") if _has(train, name)]
    written.append(_plot_lines(train, rates, folder / "rates.png", ylabel="learning rate", log=True))
    if _has(train, "ttt_alpha"):
        written.append(_plot_gates(train, folder / "gates.png"))
    return written


def plot_inner_losses(run_dir: Path, folder: Path) -> list[Path]:
    """Plot the last record of `inner_loop_losses.jsonl`, one file per layer.

    Returns:
        The files written.
    """
    lines = (run_dir / INNER_LOSSES_FILE).read_text(encoding="utf-8").splitlines()
    if not lines:
        return []
    record = json.loads(lines[-1])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for layer, losses in record["layers"].items():
        figure, axes = _figure("frame", "inner loss")
        for label, values in zip(_INNER_LABELS, losses, strict=True):
            axes.plot([float("nan") if value is None else value for value in values], label=label)
        axes.set_title(f"layer {layer}, step {record['step']}")
        axes.legend()
        written.append(_save(figure, folder / f"inner_loss_layer_{layer}.png"))
    return written


def _plot_losses(train: Sequence[dict], evaluation: Sequence[dict], path: Path) -> Path:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("text_loss", "audio_loss"), strict=True):
        axes.plot(*_series(train, name), alpha=0.6, label="training")
        if evaluation:
            axes.plot(*_series(evaluation, name), marker="o", label="held out")
        baseline = next((r[f"unigram_{name}"] for r in evaluation if f"unigram_{name}" in r), None)
        if baseline is not None:
            axes.axhline(baseline, color="grey", linestyle="--", label="unigram")
        axes.set_xlabel("step")
        axes.set_ylabel(f"{name.replace('_', ' ')} (nats)")
        axes.legend()
    return _save(figure, path)


def _plot_gates(train: Sequence[dict], path: Path) -> Path:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = (("ttt_alpha/", "mean tanh(alpha)"), ("ttt_delta/", "mean |alpha - start|"))
    for axes, (prefix, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in sorted({name for record in train for name in record if name.startswith(prefix)}):
            axes.plot(*_series(train, name), label=name.removeprefix(prefix).replace("_", " "))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend()
    return _save(figure, path)


def _plot_lines(
    records: Sequence[dict], names: Sequence[str], path: Path, *, ylabel: str, log: bool = False
) -> Path:
    figure, axes = _figure("step", ylabel)
    for name in names:
        axes.plot(*_series(records, name), label=name)
    if log:
        axes.set_yscale("log")
    axes.legend()
    return _save(figure, path)


def _figure(xlabel: str, ylabel: str):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _series(records: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _has(records: Sequence[dict], name: str) -> bool:
    return any(name in record for record in records)
