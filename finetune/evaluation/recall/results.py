"""What a measurement found, as JSON and as a table of items."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.recall.accuracy import MEASURES, Measured, correct, margins, paired, summarise
from finetune.evaluation.recall.measure import Measurement, RecallArm
from moshi_ttt.files.atomic_file import replacing

_COLUMNS = ("arm", "item", "kind", "said_by", "lag_frames", "measure", "conversations", "correct", "margin")


def summaries(
    measured: Sequence[Measured], lags: Sequence[int], bootstrap: RatioBootstrap
) -> dict[str, dict[str, Any]]:
    """By lag in frames and measure, see `summarise`."""
    return {
        str(lag): {measure: summarise(measured, lag, measure, bootstrap) for measure in MEASURES}
        for lag in lags
    }


def score(measurement: Measurement, lags: Sequence[int], bootstrap: RatioBootstrap) -> dict[str, Any]:
    """All items by arm; by who said the plant, and by kind; and what the first arm has more than others."""
    arms = measurement.measured
    first, *others = arms
    if not arms[first]:
        return {"arms": {}, "said_by": {}, "kind": {}, "differences": {}}
    return {
        "arms": {arm: summaries(items, lags, bootstrap) for arm, items in arms.items()},
        "said_by": _parts(arms, lags, bootstrap, "said_by"),
        "kind": _parts(arms, lags, bootstrap, "kind"),
        "differences": {
            f"{first} - {other}": differences(arms[first], arms[other], lags, bootstrap) for other in others
        },
    }


def differences(
    first: Sequence[Measured], second: Sequence[Measured], lags: Sequence[int], bootstrap: RatioBootstrap
) -> dict[str, dict[str, Any]]:
    """By lag in frames and measure, see `paired`."""
    return {
        str(lag): {measure: paired(first, second, lag, measure, bootstrap) for measure in MEASURES}
        for lag in lags
    }


def write_items(path: Path, arms: Mapping[RecallArm, Sequence[Measured]], lags: Sequence[int]) -> None:
    """A line per arm, item, lag and measure: right answers among its conversations, mean margin in nats.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows(_lines(arms, lags))


def _lines(arms: Mapping[RecallArm, Sequence[Measured]], lags: Sequence[int]) -> Iterable[tuple[Any, ...]]:
    for arm, items in arms.items():
        for item in items:
            for lag in lags:
                for measure in MEASURES:
                    scores = getattr(item.scores[lag], measure)
                    group, number = item.group, len(scores)
                    right = round(correct(scores), 4)
                    margin = round(margins(scores) / number, 5)
                    yield arm, group.name, group.kind, group.said_by, lag, measure, number, right, margin


def _parts(
    arms: Mapping[RecallArm, Sequence[Measured]], lags: Sequence[int], bootstrap: RatioBootstrap, by: str
) -> dict[str, dict[str, Any]]:
    names = sorted({getattr(item.group, by) for items in arms.values() for item in items})
    return {
        name: {
            arm: summaries([item for item in items if getattr(item.group, by) == name], lags, bootstrap)
            for arm, items in arms.items()
        }
        for name in names
    }
