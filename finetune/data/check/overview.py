"""A data set at a glance: durations, voices and words as plots, alone or in a page with the findings."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.data.audio.find import printable
from finetune.data.check.data_set import CheckedLine
from finetune.data.check.findings import Finding
from finetune.data.check.report import short_name, summary
from finetune.monitoring.html_page import paragraph, table, write_page

_VOICES = ("left (Moshi)", "right (user)")
_COLUMNS = ("severity", "code", "file", "line", "reason", "what to do")


def write_overview(path: Path, items: Sequence[CheckedLine], findings: Sequence[Finding]) -> None:
    """Write a picture (`.png`) or a page that holds everything it shows (`.html`), whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    rows = [(finding.severity, _cells(finding)) for finding in findings]
    write_page(
        path,
        _draw(items),
        title="Data set",
        alt="durations, voices, words per minute",
        above=[paragraph(summary(items, findings))],
        below=[table(_COLUMNS, rows)],
    )


def _draw(items: Sequence[CheckedLine]) -> Figure:
    checked = [item.checked for item in items if item.checked.duration_sec is not None]
    minutes = [c.duration_sec / 60 for c in checked if c.duration_sec is not None]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    durations, voices, words = figure.subplots(1, 3)
    _histogram(durations, [minutes], ["recordings"], "duration, minutes")
    shares = [[c.voiced[i] for c in checked if len(c.voiced) > i] for i in range(2)]
    _histogram(voices, shares, _VOICES, "share of the time with voice")
    rates = [[c.words_per_minute[i] for c in checked if c.words_per_minute] for i in range(2)]
    _histogram(words, rates, _VOICES, "words per minute")
    return figure


def _histogram(axes: Axes, values: list[list[float]], labels: Sequence[str], xlabel: str) -> None:
    axes.hist(values, bins=20, label=list(labels))
    axes.set(xlabel=xlabel, ylabel="recordings")
    if len(labels) > 1:
        axes.legend()


def _cells(finding: Finding) -> list[str]:
    line = "" if finding.line is None else short_name(Path(finding.line))
    cells = (finding.severity, finding.code, short_name(finding.path), line, finding.reason, finding.advice)
    return [printable(cell) for cell in cells]
