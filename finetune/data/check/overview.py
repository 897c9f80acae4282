"""A data set at a glance: durations, voices and words as plots, alone or in a page with the findings."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.data.audio.find import printable
from finetune.data.check.data_set import CheckedLine
from finetune.data.check.findings import Finding
from finetune.data.check.report import short_name, summary
from moshi_ttt.files.atomic_file import replacing

SUFFIXES = (".html", ".png")
_VOICES = ("left (Moshi)", "right (user)")
_STYLE = (
    "body{font-family:sans-serif;margin:2em} img{max-width:100%} td,th{text-align:left;padding:.2em .8em;"
    "vertical-align:top} .error{background:#fdd} .warning{background:#ffd}"
)


def write_overview(path: Path, items: Sequence[CheckedLine], findings: Sequence[Finding]) -> None:
    """Write a picture (`.png`) or a page that holds everything it shows (`.html`), whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    picture = _draw(items)
    content = picture if path.suffix == ".png" else _page(picture, items, findings).encode("utf-8")
    with replacing(path) as partial:
        partial.write_bytes(content)


def _draw(items: Sequence[CheckedLine]) -> bytes:
    checked = [item.checked for item in items if item.checked.duration_sec is not None]
    minutes = [c.duration_sec / 60 for c in checked if c.duration_sec is not None]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    durations, voices, words = figure.subplots(1, 3)
    _histogram(durations, [minutes], ["recordings"], "duration, minutes")
    shares = [[c.voiced[i] for c in checked if len(c.voiced) > i] for i in range(2)]
    _histogram(voices, shares, _VOICES, "share of the time with voice")
    rates = [[c.words_per_minute[i] for c in checked if c.words_per_minute] for i in range(2)]
    _histogram(words, rates, _VOICES, "words per minute")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _histogram(axes: Axes, values: list[list[float]], labels: Sequence[str], xlabel: str) -> None:
    axes.hist(values, bins=20, label=list(labels))
    axes.set(xlabel=xlabel, ylabel="recordings")
    if len(labels) > 1:
        axes.legend()


def _page(picture: bytes, items: Sequence[CheckedLine], findings: Sequence[Finding]) -> str:
    image = base64.b64encode(picture).decode("ascii")
    rows = [_row(finding) for finding in findings]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"><title>Data set</title>',
            f"<style>{_STYLE}</style></head>",
            f"<body><h1>Data set</h1><p>{html.escape(summary(items, findings))}</p>",
            f'<img alt="durations, voices, words per minute" src="data:image/png;base64,{image}">',
            "<table><tr><th>severity<th>code<th>file<th>line<th>reason<th>what to do</tr>",
            *rows,
            "</table></body></html>\n",
        ]
    )


def _row(finding: Finding) -> str:
    line = "" if finding.line is None else short_name(Path(finding.line))
    cells = (finding.severity, finding.code, short_name(finding.path), line, finding.reason, finding.advice)
    columns = "".join(f"<td>{html.escape(printable(cell))}" for cell in cells)
    return f'<tr class="{finding.severity}">{columns}</tr>'
