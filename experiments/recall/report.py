"""Tables and plots of the runs in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.recall.arms import ARMS
from experiments.recall.runs import Run, read_run
from experiments.recall.studies import ABLATIONS, EXPERIMENTS, FIRST_LAYER_STDS, GATES, HEAD_DIMS

_Runs = Mapping[str, Sequence[Run]]  # by label, one per seed


def write_report(folder: Path, experiment: str) -> list[Path]:
    """Tables and plots of what is there so far.

    Returns:
        The files written.
    """
    runs = read_runs(folder)
    report = folder / "report.md"
    if experiment == "init":
        report.write_text(initialisation_table(runs) + "\n")
        return [report]
    if experiment in ("ablation", "gate"):
        changes = ABLATIONS if experiment == "ablation" else GATES
        report.write_text(ablation_table(runs, changes) + "\n")
        return [report]
    report.write_text(arms_table(runs) + "\n")
    return [report, plot_arms(runs, folder / "arms.png", unit=EXPERIMENTS[experiment].unit)]


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """All runs of an experiment by their label, in order of the seeds; labels of arms are the arms' names.

    Raises:
        DataError: the file of one is damaged.
    """
    runs: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*.seed*.json")):
        label = path.name.rpartition(".seed")[0]
        runs.setdefault(label, []).append(read_run(path))
    for same in runs.values():
        same.sort(key=lambda run: run.description["seed"])
    return runs


def recovered(runs: _Runs, label: str, *, window: str = "window", full: str = "full") -> list[float]:
    """Share of the gap between the short window and full attention that an arm closes, by seed.

    The two ends are means over their seeds. Empty where there is no gap: an end is not there, or full
    attention has not become better than the short window.
    """
    ends = [_last_losses(runs.get(end, ())) for end in (window, full)]
    if not all(ends):
        return []
    low, high = (float(np.mean(losses)) for losses in ends)
    return [(low - loss) / (low - high) for loss in _last_losses(runs[label])] if low > high else []


def _last_losses(same: Sequence[Run]) -> list[float]:
    """Of the runs that came to an evaluation."""
    return [run.losses[-1] for run in same if run.losses]


def arms_table(runs: _Runs) -> str:
    """Markdown: loss, recovered share, size and time of every arm."""
    lines = [
        "| arm | parameters | loss, mean (seeds) | share of the gap, mean (seeds) | steps | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for arm, meaning in ARMS.items():
        if arm not in runs:
            continue
        same = runs[arm]
        losses = _mean_and_each(_last_losses(same), 4, ".4f")
        shares = _mean_and_each([100 * share for share in recovered(runs, arm)], 1, ".0f", " %")
        num_steps = max((run.steps[-1] for run in same if run.steps), default=0)
        minutes = [run.minutes[-1] for run in same if run.minutes]
        lines.append(
            f"| {meaning} | {same[0].num_parameters:,} | {losses} | {shares} | {num_steps:,} | "
            f"{f'{np.mean(minutes):.1f}' if minutes else '-'} |"
        )
    return "\n".join(lines + _problems(runs))


def initialisation_table(runs: _Runs) -> str:
    """Markdown: recovered share of each initialisation and head_dim, mean and seeds."""
    names = [*(f"std{std:g}" for std in FIRST_LAYER_STDS), "published"]
    lines = [
        "| first inner layer | " + " | ".join(f"D = {dim}" for dim in HEAD_DIMS) + " |",
        "|---|" + "---|" * len(HEAD_DIMS),
    ]
    for name in names:
        cells = []
        for dim in HEAD_DIMS:
            ends = {"window": f"d{dim}.window", "full": f"d{dim}.full"}
            label = f"d{dim}.{name}"
            shares = [100 * share for share in recovered(runs, label, **ends)] if label in runs else []
            cells.append(_mean_and_each(shares, 0, ".0f", " %"))
        lines.append(f"| {_initialisation(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines + _problems(runs))


def ablation_table(runs: _Runs, changes_of: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: recovered share with the settings that are changed under each label, mean and seeds."""
    lines = ["| changed | share of the gap, mean (seeds) |", "|---|---|"]
    for label, changes in changes_of.items():
        if label in runs:
            shares = [100 * share for share in recovered(runs, label)]
            changed = ", ".join(f"`{name}: {value}`" for name, value in changes.items()) or "nothing"
            lines.append(f"| {changed} | {_mean_and_each(shares, 0, '.0f', ' %')} |")
    return "\n".join(lines + _problems(runs))


def plot_arms(runs: _Runs, path: Path, *, unit: str) -> Path:
    """Loss by position at the end, and loss over the training, a line per arm with its seeds behind.

    The line is the mean of the runs that went on longest, that is to the end where one did.
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_position, over_steps = figure.subplots(1, 2)
    for color, (arm, meaning) in enumerate(ARMS.items()):
        if arm not in runs:
            continue
        for axes, lines in (
            (by_position, [(range(len(run.by_position)), run.by_position) for run in runs[arm]]),
            (over_steps, [(run.steps, run.losses) for run in runs[arm]]),
        ):
            for x, y in lines:
                axes.plot(x, y, color=f"C{color}", alpha=0.25, linewidth=0.8)
            longest = max((list(x) for x, _ in lines), key=lambda x: x[-1:])
            mean = np.mean([y for x, y in lines if list(x) == longest], axis=0)
            axes.plot(longest, mean, color=f"C{color}", label=meaning)
    by_position.set_xlabel(unit)
    by_position.set_ylabel("loss (nats)")
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("loss of the scored positions (nats)")
    figure.legend(*over_steps.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)
    return path


def _mean_and_each(values: Sequence[float], digits: int, each: str, unit: str = "") -> str:
    if not values:
        return "-"
    parts = ", ".join(f"{_number(value, each)}{unit}" for value in values)
    return f"{_number(float(np.mean(values)), f'.{digits}f')}{unit} ({parts})"


def _number(value: float, spec: str) -> str:
    text = format(value, spec)
    return text.removeprefix("-") if float(text) == 0 else text


def _initialisation(name: str) -> str:
    if name == "published":
        return "published: all layers N(0, 0.02²)"
    std = name.removeprefix("std")
    return f"N(0, {std}²)" + (" = unit_variance" if std == "1" else "")


def _problems(runs: _Runs) -> list[str]:
    found = [
        f"- {label} seed {run.description['seed']}: {run.problem}"
        for label, same in runs.items()
        for run in same
        if run.problem is not None
    ]
    return ["", "Runs that did not finish:", *found] if found else []
