"""The page of a diagnosis: a plot per quantity with its healthy range, and the table. One file, no links."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.diagnose.rules import RULES, Rule
from finetune.diagnose.verdict import Diagnosis, conclusion, remark_lines, table_lines
from finetune.monitoring.html_page import bullets, paragraph, preformatted, write_page

_COLUMNS = 3


def write_report(diagnosis: Diagnosis, path: Path) -> None:
    """Write the page (`.html`) or only its plots (`.png`); an older file is replaced.

    Raises:
        OSError: it cannot be written.
    """
    write_page(
        path,
        _draw(diagnosis),
        title=f"Diagnosis of {diagnosis.run_dir}",
        alt="quantities",
        above=[
            paragraph(conclusion(diagnosis)),
            bullets(remark_lines(diagnosis)),
            preformatted(table_lines(diagnosis)),
        ],
    )


def _draw(diagnosis: Diagnosis) -> Figure:
    quantities = list(diagnosis.series)
    rows = max(1, math.ceil(len(quantities) / _COLUMNS))
    figure = Figure(figsize=(5 * _COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes in panels[len(quantities) :]:
        axes.set_axis_off()
    for axes, quantity in zip(panels, quantities, strict=False):
        _plot(axes, quantity, diagnosis)
    return figure


def _plot(axes: Axes, quantity: str, diagnosis: Diagnosis) -> None:
    for where, (steps, values) in diagnosis.series[quantity].items():
        axes.plot(steps, values, marker=".", markersize=3, linewidth=1, label=where)
    for rule in (rule for rule in RULES if rule.quantity == quantity):
        _shade(axes, rule)
    axes.set_title(quantity, fontsize=10)
    axes.set_xlabel("step")
    axes.legend(fontsize=7)


def _shade(axes: Axes, rule: Rule) -> None:
    """Outside the range in red, without stretching the axis to where nothing is."""
    low, high = axes.get_ylim()
    if rule.lowest is not None and rule.lowest > low:
        axes.axhspan(low, rule.lowest, color="tab:red", alpha=0.15)
    if rule.highest is not None and rule.highest < high:
        axes.axhspan(rule.highest, high, color="tab:red", alpha=0.15)
    axes.set_ylim(low, high)
