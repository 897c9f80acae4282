"""Tables and plots of the runs in a folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.recall.arms import ARMS
from experiments.recall.runs import Run
from experiments.recall.studies import EXPERIMENTS, FIRST_LAYER_STDS, HEAD_DIMS

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
    report.write_text(arms_table(runs) + "\n")
    return [report, plot_arms(runs, folder / "arms.png", unit=EXPERIMENTS[experiment].unit)]


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """All runs of an experiment by their label, in order of the seeds; labels of arms are the arms' names."""
    runs: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*.seed*.json")):
        label = path.name.rpartition(".seed")[0]
        runs.setdefault(label, []).append(Run(**json.loads(path.read_text())))
    for same in runs.values():
        same.sort(key=lambda run: run.description["seed"])
    return runs


def recovered(runs: _Runs, label: str, *, window: str = "window", full: str = "full") -> list[float]:
    """Share of the gap between the short window and full attention that an arm closes, by seed.

    The two ends are means over their seeds.
    """
    low, high = (float(np.mean([run.loss for run in runs[end]])) for end in (window, full))
    return [(low - run.loss) / (low - high) for run in runs[label]]


def arms_table(runs: _Runs) -> str:
    """Markdown: loss, recovered share, size and time of every arm."""
    lines = [
        "| arm | parameters | loss, mean (seeds) | share of the gap, mean (seeds) | steps | minutes |",
        "|---|---|---|---|---|---|",
    ]
    complete = {"window", "full"} <= runs.keys()
    for arm, meaning in ARMS.items():
        if arm not in runs:
            continue
        same = runs[arm]
        losses = [run.loss for run in same]
        shares = [f"{100 * share:.0f} %" for share in recovered(runs, arm)] if complete else []
        mean = f"{100 * np.mean(recovered(runs, arm)):.1f} %" if complete else "-"
        lines.append(
            f"| {meaning} | {same[0].num_parameters:,} | {np.mean(losses):.4f} "
            f"({', '.join(f'{loss:.4f}' for loss in losses)}) | {mean} ({', '.join(shares)}) | "
            f"{max((*same[0].steps, 0)):,} | {np.mean([max((*run.minutes, 0)) for run in same]):.1f} |"
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
            if not {f"d{dim}.{name}", *ends.values()} <= runs.keys():
                cells.append("-")
                continue
            shares = [100 * share for share in recovered(runs, f"d{dim}.{name}", **ends)]
            cells.append(f"{np.mean(shares):.0f} % ({', '.join(f'{share:.0f}' for share in shares)})")
        lines.append(f"| {_initialisation(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines + _problems(runs))


def plot_arms(runs: _Runs, path: Path, *, unit: str) -> Path:
    """Loss by position at the end, and loss over the training, a line per arm with its seeds behind.

    Of runs that finished.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_position, over_steps = figure.subplots(1, 2)
    for color, (arm, meaning) in enumerate(ARMS.items()):
        finished = [run for run in runs.get(arm, ()) if run.problem is None]
        if not finished:
            continue
        for axes, lines in (
            (by_position, [(range(len(run.by_position)), run.by_position) for run in finished]),
            (over_steps, [(run.steps, run.losses) for run in finished]),
        ):
            for x, y in lines:
                axes.plot(x, y, color=f"C{color}", alpha=0.25, linewidth=0.8)
            mean = np.mean([y for _, y in lines], axis=0)
            axes.plot(lines[0][0], mean, color=f"C{color}", label=meaning)
    by_position.set_xlabel(unit)
    by_position.set_ylabel("loss (nats)")
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("loss of the scored positions (nats)")
    by_position.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


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
