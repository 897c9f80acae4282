"""The accuracies as text, for terminals and logs."""

from collections.abc import Mapping, Sequence
from typing import Any

from moshi.models.loaders import FRAME_RATE

from finetune.evaluation.recall.accuracy import MEASURES
from finetune.evaluation.text_table import aligned

_NAMES = {"text": "words", "semantic": "first codebook", "audio": "all codebooks"}


def tables(results: Mapping[str, Any], lags: Sequence[int]) -> list[str]:
    """Lines with a table per measure: right answers by lag, of each arm, of parts, and differences.

    Args:
        results: of `finetune.evaluation.recall.results.score`.
        lags: in frames.
    """
    if not results["arms"]:
        return []
    first = next(iter(results["arms"].values()))[str(lags[0])]["text"]
    lines = [
        "",
        f"right answers, with 95 % intervals over {first['num_items']:,} items "
        f"({first['num_conversations']:,} conversations); chance is {100 * first['chance']:.1f} %",
    ]
    rows: dict[str, Mapping[str, Any]] = dict(results["arms"])
    leading = next(iter(results["arms"]))
    for by, title in (("said_by", "said by {}"), ("kind", "{}")):
        if len(results[by]) > 1:
            rows |= {f"{leading}, {title.format(name)}": arms[leading] for name, arms in results[by].items()}
    for measure in MEASURES:
        head = [_NAMES[measure], *(lag_name(lag) for lag in lags)]
        table = [head, *([name, *_cells(row, lags, measure)] for name, row in rows.items())]
        table += [
            [name, *_cells(row, lags, measure, signed=True)] for name, row in results["differences"].items()
        ]
        lines += ["", *aligned(table)]
    return lines


def comparison_tables(differences: Mapping[str, Any], lags: Sequence[int]) -> list[str]:
    """Lines with what the first of two models has more, by measure and lag."""
    head = ["first - second", *(lag_name(lag) for lag in lags)]
    rows = [[_NAMES[measure], *_cells(differences, lags, measure, signed=True)] for measure in MEASURES]
    return ["", *aligned([head, *rows])]


def lag_name(lag: int) -> str:
    """Of frames, in seconds or minutes."""
    seconds = lag / FRAME_RATE
    return f"{seconds / 60:g} min" if seconds >= 120 and seconds % 60 == 0 else f"{seconds:g} s"


def _cells(row: Mapping[str, Any], lags: Sequence[int], measure: str, *, signed: bool = False) -> list[str]:
    sign = "+" if signed else ""
    cells = []
    for lag in lags:
        entry = row[str(lag)][measure]
        text = f"{100 * entry['accuracy']:{sign}.1f} %"
        if entry["interval"] is not None:
            low, high = (100 * end for end in entry["interval"])
            text += f" [{low:{sign}.1f}, {high:{sign}.1f}]"
        cells.append(text)
    return cells
