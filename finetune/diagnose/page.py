"""The page of a diagnosis: a plot per quantity with its healthy range, and the table. One file, no links."""

import base64
import html
import io
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.diagnose.rules import RULES, Rule
from finetune.diagnose.verdict import Diagnosis, conclusion, remark_lines, table_lines
from moshi_ttt.files.atomic_file import replacing

SUFFIXES = (".html", ".png")
_COLUMNS = 3


def write_report(diagnosis: Diagnosis, path: Path) -> None:
    """Write the page (`.html`) or only its plots (`.png`); an older file is replaced.

    Raises:
        OSError: it cannot be written.
    """
    picture = _picture(diagnosis)
    with replacing(path) as partial:
        if path.suffix == ".png":
            partial.write_bytes(picture)
        else:
            partial.write_text(_page(diagnosis, picture), encoding="utf-8")


def _picture(diagnosis: Diagnosis) -> bytes:
    quantities = list(diagnosis.series)
    rows = max(1, math.ceil(len(quantities) / _COLUMNS))
    figure = Figure(figsize=(5 * _COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes in panels[len(quantities) :]:
        axes.set_axis_off()
    for axes, quantity in zip(panels, quantities, strict=False):
        _plot(axes, quantity, diagnosis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


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


def _page(diagnosis: Diagnosis, picture: bytes) -> str:
    title = html.escape(f"Diagnosis of {diagnosis.run_dir}")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>',
        '<body style="font-family: sans-serif; margin: 2em">',
        f"<h1>{title}</h1>",
        f"<p>{html.escape(conclusion(diagnosis))}</p>",
        "<ul>",
        *(f"<li>{html.escape(line)}</li>" for line in remark_lines(diagnosis)),
        "</ul>",
        f"<pre>{html.escape(chr(10).join(table_lines(diagnosis)))}</pre>",
        f'<img alt="quantities" style="max-width: 100%" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">',
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"
