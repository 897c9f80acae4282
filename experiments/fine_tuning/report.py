"""Tables and pictures of the runs in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.fine_tuning.studies import STUDIES, Plan, Study
from experiments.fine_tuning.tasks import PERIOD
from experiments.stored_runs import read_run

_IN_THE_PICTURE = 8  # arms, the others of a long study would hide them
_LEFT_OUT = ("wider", "rate-tie", "rate-shift", "shift-tie", "slow-gates", "lora", "published-400")

_Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # by label, one per seed


def write_report(folder: Path, name: str) -> list[Path]:
    """Table and picture of what is there so far of a study.

    Returns:
        The files written.
    """
    runs, study = read_runs(folder), STUDIES[name]
    report, picture = folder / "report.md", folder / f"{name}.png"
    plans = [plan for plan in study.plans if plan.arm.label in runs]
    if study.difficulty is not None:
        table = difficulty_table(study, plans, runs)
        plot_difficulties(study, plans, runs, picture)
    else:
        table = recall_table(plans, runs)
        plot_recall(plans, runs, picture)
    report.write_text(table + "\n", encoding="utf-8")
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


def recalled(plan: Plan, same: Sequence[Mapping[str, Any]], difficulty: int | None = None) -> list[float]:
    """Recalled share in percent, by seed: 0 is guessing, where a window ends too, and 100 no loss at all."""
    losses = [run["loss"] if difficulty is None else run["losses"][str(difficulty)] for run in same]
    return [100 * (1 - loss / plan.task.guessing) for loss in losses]


def recall_table(plans: Sequence[Plan], runs: _Runs) -> str:
    """Markdown: recalled share, loss, steps, size and gates of every arm."""
    lines = [
        "| fine-tuned | recalled, mean (seeds) | nats | steps | parameters | gates |",
        "|---|---|---|---|---|---|",
    ]
    for plan in plans:
        same = runs[plan.arm.label]
        nats = np.mean([run["loss"] for run in same])
        share = _mean_and_each(recalled(plan, same), ".1f")
        steps = same[0]["description"]["arm"]["num_steps"]
        gates = [gate for run in same for gate in run["gates"].values()]
        lines.append(
            f"| {plan.arm.meaning} | {share} | {nats:.3f} | {steps:,} | "
            f"{same[0]['num_parameters']:,} | {f'{np.mean(gates):.2f}' if gates else '-'} |"
        )
    return "\n".join(lines)


def difficulty_table(study: Study, plans: Sequence[Plan], runs: _Runs) -> str:
    """Markdown: recalled share by difficulty, mean and seeds."""
    numbers = study.plans[0].difficulties
    lines = [
        f"| {study.difficulty} | " + " | ".join(f"{number:,}" for number in numbers) + " |",
        "|---|" + "---|" * len(numbers),
    ]
    for plan in plans:
        same = runs[plan.arm.label]
        cells = [_mean_and_each(recalled(plan, same, number), ".0f") for number in numbers]
        lines.append(f"| {plan.arm.meaning}{plan.task.remark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_recall(plans: Sequence[Plan], runs: _Runs, path: Path) -> Path:
    """Loss by position at the end, and over the training; means over the seeds."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    by_position, over_steps = figure.subplots(1, 2)
    shown = [
        plan.arm.label for plan in plans if plan.arm.label not in _LEFT_OUT or len(plans) <= _IN_THE_PICTURE
    ]
    for label in shown:
        by_position.plot(np.mean([run["by_position"] for run in runs[label]], axis=0), label=label)
        curve = np.mean([run["curve"] for run in runs[label]], axis=0)
        over_steps.plot(50 * np.arange(1, len(curve) + 1), curve, label=label)
    for start in (PERIOD, 2 * PERIOD):
        by_position.axvline(start, color="grey", linewidth=0.6, linestyle=":")
    by_position.set_xlabel("token")
    by_position.set_ylabel("loss (nats)")
    over_steps.set_xlabel("step of fine-tuning")
    over_steps.set_ylabel("loss of what only a memory can know (nats)")
    if shown:
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=110)
    return path


def plot_difficulties(study: Study, plans: Sequence[Plan], runs: _Runs, path: Path) -> Path:
    """Recalled share over the difficulty, a line per memory with its seeds behind."""
    numbers = study.plans[0].difficulties
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    x = [max(number, numbers[1] / 2) for number in numbers]  # 0 has no place on a logarithmic axis
    for color, plan in enumerate(plans):
        lines = np.array([recalled(plan, runs[plan.arm.label], number) for number in numbers])
        axes.plot(x, lines, color=f"C{color}", alpha=0.25, linewidth=0.8)
        axes.plot(x, lines.mean(1), color=f"C{color}", marker="o", markersize=3, label=plan.arm.label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{number:,}" for number in numbers])
    axes.set_ylim(-10, 102)
    axes.set_xlabel(str(study.difficulty))
    axes.set_ylabel("recalled (%)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return path


def _mean_and_each(values: Sequence[float], spec: str) -> str:
    each = ", ".join(_number(value, spec) for value in values)
    return f"{_number(float(np.mean(values)), spec)} % ({each})"


def _number(value: float, spec: str) -> str:
    text = format(value, spec)
    return text.removeprefix("-") if float(text) == 0 else text
