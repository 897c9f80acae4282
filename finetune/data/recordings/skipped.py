"""Recordings that cannot be used: an error that ends the run, or a list of what was left out."""

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.recordings.lines import Fault, Recording
from finetune.distributed import gather_objects
from finetune.errors import DataError
from moshi_ttt.files.atomic_file import replacing

logger = logging.getLogger(__name__)

SKIPPED_FILE = "data_skipped.json"
MAX_WARNINGS = 20


class CheckedSource(NamedTuple):
    """What a look at recordings found."""

    usable: list[Recording]
    faults: list[Fault]


class SkipList:
    """Faults of recordings that are left out; the same in all processes."""

    def __init__(self) -> None:
        """Start empty."""
        self.faults: list[Fault] = []

    def leave_out(self, found: CheckedSource, *, key: str) -> list[Recording]:
        """Note what every process found, and warn; every process must call it.

        Args:
            found: by this process, of recordings that all processes have in this order.
            key: configuration key of the manifest, for messages.

        Returns:
            The recordings that all processes can use.

        Raises:
            DataError: None is left.
        """
        faults = _agree(found.faults)
        for number, fault in enumerate(faults, start=len(self.faults) + 1):
            if number <= MAX_WARNINGS:
                logger.warning("Left out: %s", fault.message)
        self.faults += faults
        if len(self.faults) > MAX_WARNINGS and faults:
            logger.warning("Left out so far: %d recordings.", len(self.faults))
        bad = {fault.identity for fault in faults}
        usable = [recording for recording in found.usable if recording.identity not in bad]
        if not usable:
            raise DataError(f"{key}: no recording is left that can be used; the first: {faults[0].message}")
        return usable

    def write(self, run_dir: Path) -> None:
        """Write `data_skipped.json` into a run directory, whole or not at all."""
        text = json.dumps([_record(fault) for fault in self.faults], indent=2)
        with replacing(run_dir / SKIPPED_FILE) as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def _agree(faults: Collection[Fault]) -> list[Fault]:
    """The faults that any process has found, in the order of the manifests' lines."""
    first_found: dict[tuple, Fault] = {}
    for part in gather_objects(list(faults)):
        for fault in part:
            first_found.setdefault(fault.identity, fault)
    return sorted(first_found.values(), key=lambda fault: fault.identity)


def _record(fault: Fault) -> dict[str, Any]:
    return {"manifest": fault.manifest, "line": fault.line, "path": fault.path, "reason": fault.reason}
