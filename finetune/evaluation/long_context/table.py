"""The scores of a measurement as text, for terminals and logs."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.long_context.results import LOSS, METRICS, OVERALL
from finetune.evaluation.long_context.statistics import THIRDS

_NOTHING = "—"
_SLOPES = (OVERALL, *THIRDS)


def score_tables(results: Mapping[str, Any]) -> list[str]:
    """Lines with one table per metric that has a loss: an arm or difference per row.

    Args:
        results: of `score`.
    """
    lines = []
    for metric in METRICS:
        rows = {arm: by_metric[metric] for arm, by_metric in results["details"].items()}
        if all(row[LOSS]["value"] is None for row in rows.values()):
            continue
        names = [name for name in next(iter(rows.values())) if name not in _SLOPES]
        titles = ["all" if name == LOSS else name.removeprefix("librilight_") for name in names]
        table = [["arm", *titles, *_SLOPES]]
        table += [[arm, *(_cell(row[name]) for name in (*names, *_SLOPES))] for arm, row in rows.items()]
        for pair, by_metric in results["differences"].items():
            table.append([pair, *(_difference_cell(by_metric[metric][name]) for name in names)])
        lines += ["", f"{metric} loss, nats; slopes in nats per 1,000 frames", *_aligned(table)]
    return lines


def _cell(entry: Mapping[str, Any]) -> str:
    return _NOTHING if entry["value"] is None else f"{entry['value']:.4f}"


def _difference_cell(entry: Mapping[str, Any]) -> str:
    if entry["interval"] is None:
        return _NOTHING if entry["value"] is None else f"{entry['value']:+.4f}"
    low, high = entry["interval"]
    return f"{entry['value']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    num_columns = max(map(len, table))
    filled = [[*row, *[""] * (num_columns - len(row))] for row in table]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    lines = []
    for first, *others in filled:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
