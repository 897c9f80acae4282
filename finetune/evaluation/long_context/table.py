"""The scores of a measurement as text, for terminals and logs."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.long_context.results import LOSS, METRICS, OVERALL
from finetune.evaluation.long_context.statistics import THIRDS
from finetune.evaluation.text_table import aligned

_NOTHING = "—"
_SLOPES = (OVERALL, *THIRDS)


def score_tables(results: Mapping[str, Any]) -> list[str]:
    """Lines with a table per metric that has a loss; of the audio loss, intervals and differences too.

    Args:
        results: of `score`.
    """
    lines: list[str] = []
    for metric in METRICS:
        rows = {arm: by_metric[metric] for arm, by_metric in results["details"].items()}
        if all(row[LOSS]["value"] is None for row in rows.values()):
            continue
        means = [name for name in next(iter(rows.values())) if name not in _SLOPES]
        lines += _table(f"{metric} loss in nats", rows, means)
        if metric == METRICS[0]:
            pairs = {pair: by_metric[metric] for pair, by_metric in results["differences"].items()}
            lines += _table("differences", pairs, means, signed=True)
        lines += _table("slope in nats per 1,000 frames", rows, _SLOPES, signed=True)
    return lines


def _table(
    title: str, rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], *, signed: bool = False
) -> list[str]:
    """Lines with a row per arm or difference and a column per score; signed ones have intervals."""
    if not rows:
        return []
    heads = ["all" if name == LOSS else name.removeprefix("librilight_") for name in names]
    table = [["", *heads]]
    table += [[label, *(_cell(row[name], signed=signed) for name in names)] for label, row in rows.items()]
    if signed and any(row[name]["interval"] is not None for row in rows.values() for name in names):
        title += ", with 95 % intervals over recordings"
    return ["", title, *aligned(table)]


def _cell(entry: Mapping[str, Any], *, signed: bool) -> str:
    if entry["value"] is None:
        return _NOTHING
    if not signed:
        return f"{entry['value']:.4f}"
    if entry["interval"] is None:
        return f"{entry['value']:+.4f}"
    low, high = entry["interval"]
    return f"{entry['value']:+.4f} [{low:+.4f}, {high:+.4f}]"
