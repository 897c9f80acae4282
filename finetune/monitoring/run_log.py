"""Reads the records of a run that may still be going, or that ended in the middle of a line."""

import json
from pathlib import Path
from typing import NamedTuple

from finetune.errors import DataError
from finetune.monitoring.metrics import METRICS_FILE


class LogRecord(NamedTuple):
    """One record of one split."""

    step: int
    values: dict[str, float | None]  # None: not finite


def read_records(run_dir: Path, split: str) -> list[LogRecord]:
    """The records of one split in order; empty without a log, and a last line that was cut off is left out.

    Raises:
        DataError: the log cannot be read, or another line is damaged.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    records = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    break
                record = _parse(line, f"{path}: line {number}")
                if record.pop("split") == split:
                    records.append(LogRecord(record.pop("step"), record))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    return records


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
        split, step = record["split"], record["step"]
        numbers = all(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            for name, value in record.items()
            if name != "split"
        )
        if not numbers or not isinstance(split, str) or not isinstance(step, int):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{where} is not a record of metrics; remove it to judge the rest.") from None
    return record
