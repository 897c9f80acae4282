"""Tables and pictures of the runs in a folder."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.fine_tuning.studies import GAPS, STUDIES, Plan
from experiments.fine_tuning.tasks import NUM_SYMBOLS, PERIOD
from experiments.stored_runs import read_run

_CHANCE = math.log(NUM_SYMBOLS)  # nats, where nothing is recalled
_IN_THE_PICTURE = ("window", "frozen", "published", "one-rate", "ttt-only", "defaults", "full")

_Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by label, one per seed


def write_report(folder: Path, study: str) -> list[Path]:
    """Tables and pictures of what is there so far.

    Returns:
        The files written.
    """
    runs = read_runs(folder)
    report, picture = folder / "report.md", folder / f"{study}.png"
    plans = [plan for plan in STUDIES[study] if plan.arm.label in runs]
    if study == "retention":
        report.write_text(retention_table(plans, runs) + "\n", encoding="utf-8")
        plot_retention(plans, runs, picture)
    else:
        report.write_text(recall_table(plans, runs) + "\n", encoding="utf-8")
        plot_recall(plans, runs, picture)
    return [report, picture]


def read_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All runs of a study by their label, in order of the seeds.

    Raises:
        DataError: the file of one is damaged.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.seed*.json")):
        runs.setdefault(path.name.rpartition(".seed")[0], []).append(read_run(path))
    for same in runs.values():
        same.sort(key=lambda run: run["description"]["seed"])
    return runs


def shares(runs: _Runs, label: str) -> list[float]:
    """Share of the gap between the window alone and attention to everything, in percent, by seed.

    The two ends are means over their seeds.
    """
    low, high = (float(np.mean([run["loss"] for run in runs[end]])) for end in ("window", "full"))
    return [100 * (low - run["loss"]) / (low - high) for run in runs[label]]


def recall_table(plans: Sequence[Plan], runs: _Runs) -> str:
    """Markdown: loss, share of the gap, steps, size and gates of every arm."""
    has_ends = {"window", "full"} <= runs.keys()
    lines = [
        "| fine-tuned | share of the gap, mean (seeds) | loss, nats | steps | parameters | gates |",
        "|---|---|---|---|---|---|",
    ]
    for plan in plans:
        same = runs[plan.arm.label]
        share = _mean_and_each(shares(runs, plan.arm.label), ".1f") if has_ends else "-"
        losses = np.mean([run["loss"] for run in same])
        steps = same[0]["description"]["arm"]["num_steps"]
        gates = [gate for run in same for gate in run["gates"].values()]
        lines.append(
            f"| {plan.arm.meaning} | {share} | {losses:.3f} | {steps:,} | {same[0]['num_parameters']:,} | "
            f"{f'{np.mean(gates):.2f}' if gates else '-'} |"
        )
    return "\n".join(lines)


def retention_table(plans: Sequence[Plan], runs: _Runs) -> str:
    """Markdown: recalled share by gap, mean and seeds."""
    heads = " | ".join(f"{gap:,}" for gap in GAPS)
    lines = [f"| in between | memory | {heads} |", "|---|---|" + "---|" * len(GAPS)]
    for plan in plans:
        cells = [_mean_and_each(_recalled(runs[plan.arm.label], gap), ".0f") for gap in GAPS]
        lines.append(f"| {plan.task.filler} symbols | {plan.arm.meaning} | {' | '.join(cells)} |")  # type: ignore[union-attr]
    return "\n".join(lines)


def _recalled(same: Sequence[Mapping[str, Any]], gap: int) -> list[float]:
    """Share of the pattern that is recalled, in percent: 0 is chance, 100 is no loss."""
    return [100 * (1 - run["loss_by_gap"][str(gap)] / _CHANCE) for run in same]


def plot_recall(plans: Sequence[Plan], runs: _Runs, path: Path) -> Path:
    """Loss by position at the end, and over the training; means over the seeds."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_position, over_steps = figure.subplots(1, 2)
    for plan in plans:
        label = plan.arm.label
        if label not in _IN_THE_PICTURE:
            continue
        by_position.plot(np.mean([run["by_position"] for run in runs[label]], axis=0), label=label)
        curve = np.mean([run["curve"] for run in runs[label]], axis=0)
        over_steps.plot(50 * np.arange(1, len(curve) + 1), curve, label=label)
    for start in (PERIOD, 2 * PERIOD):
        by_position.axvline(start, color="grey", linewidth=0.6, linestyle=":")
    by_position.set_xlabel("token")
    by_position.set_ylabel("loss (nats)")
    over_steps.set_xlabel("step of fine-tuning")
    over_steps.set_ylabel("loss of what only a memory can know (nats)")
    if plans:
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=110)
    return path


def plot_retention(plans: Sequence[Plan], runs: _Runs, path: Path) -> Path:
    """Recalled share over the gap, a line per memory with its seeds behind."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    x = [max(gap, 16) for gap in GAPS]  # 0 has no place on a logarithmic axis
    for color, plan in enumerate(plans):
        lines = np.array([_recalled(runs[plan.arm.label], gap) for gap in GAPS])
        axes.plot(x, lines, color=f"C{color}", alpha=0.25, linewidth=0.8)
        axes.plot(x, lines.mean(1), color=f"C{color}", marker="o", markersize=3, label=plan.arm.label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{gap:,}" for gap in GAPS])
    axes.set_ylim(-10, 102)
    axes.set_xlabel("tokens between first and second hearing")
    axes.set_ylabel("recalled (%)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _mean_and_each(values: Sequence[float], spec: str) -> str:
    each = ", ".join(f"{value + 0.0:{spec}}" for value in values)  # no -0.0
    return f"{np.mean(values) + 0.0:{spec}} % ({each})"
