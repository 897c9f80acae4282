"""The table and the figures of the cases."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.failures.cases import CASES, Case
from finetune.diagnose.page import write_report
from finetune.diagnose.rules import RULES
from finetune.diagnose.verdict import Diagnosis, diagnose_run
from moshi_ttt.files.atomic_file import replacing

_COLUMNS = 3


def cases_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what was found since when, and the losses."""
    lines = ["| case | found (since step) | as expected | first and last loss |", "|---|---|---|---|"]
    for result in results.values():
        found = ", ".join(f"{name} ({result['first_step'][name]})" for name in result["found"])
        lines.append(
            f"| {result['title']} | {found or 'nothing'} | {'yes' if result['as_expected'] else 'no'} | "
            f"{result['loss_first']:.2f}, {result['loss_last']:.2f} |"
        )
    return "\n".join(lines)


def leak_table(leaks: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the losses of `causal` true and false."""
    lines = ["| `ttt.causal` | loss as trained | loss in a stream | best possible |", "|---|---|---|---|"]
    for causal, loss in leaks.items():
        lines.append(
            f"| {causal} | {loss['as_trained']:.3f} | {loss['streamed']:.3f} | {loss['chance']:.3f} |"
        )
    return "\n".join(lines)


def write_figures(folder: Path, names: Sequence[str]) -> None:
    """Beside the cases, a figure of each, and `cases.png` with the quantity by which each is seen."""
    diagnoses = {name: diagnose_run(folder / name) for name in names}
    for name, diagnosis in diagnoses.items():
        write_report(diagnosis, folder / f"{name}.png")
    shown = [name for name in names if CASES[name].shows is not None]
    if not shown:
        return
    rows = math.ceil(len(shown) / _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, shown, strict=False):
        _plot(axes, CASES[name], diagnoses[name], diagnoses.get("healthy"))
    with replacing(folder / "cases.png") as partial:
        figure.savefig(partial, format="png", dpi=80)


def _plot(axes: Axes, case: Case, diagnosis: Diagnosis, healthy: Diagnosis | None) -> None:
    """A line per layer or group: the case in red, the healthy run in grey; dashed, the ends of the range."""
    numbers = []
    for one, color in ((healthy, "tab:gray"), (diagnosis, "tab:red")):
        places = {} if one is None or case.shows is None else one.series.get(case.shows, {})
        for where, (steps, values) in places.items():
            if where != "group ttt_alpha":  # not judged
                axes.plot(steps, values, color=color, marker=".", linewidth=1)
                numbers += values
    finite = [number for number in numbers if math.isfinite(number)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
    low, high = axes.get_ylim()
    for rule in RULES:
        for end in (rule.lowest, rule.highest):
            if rule.quantity == case.shows and end is not None and low < end < high:
                axes.axhline(end, color="black", linestyle="--", linewidth=0.8)
    axes.set_title(f"{case.title}\n{case.shows}".replace("`", ""), fontsize=8)
    axes.set_xlabel("step")
