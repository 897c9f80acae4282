"""Trains a case with the product's own trainer, and asks the product's own diagnosis about it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.failures.cases import Case
from experiments.tiny_runs import changed, tiny_values, train_to_the_end
from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.demo.assets import DemoAssets
from finetune.diagnose.verdict import Diagnosis, diagnose_run
from finetune.monitoring.metrics_file import read_records


def case_args(case: Case, demo: DemoAssets, run_dir: Path, *, num_steps: int) -> TrainArgs:
    """The quickstart's settings with smaller batches, and what the case changes."""
    values = changed(
        tiny_values(demo, run_dir, num_steps=num_steps),
        {"ttt": {"alpha_lr_multiplier": 10}, "diagnostics": {"freq": 2}},
    )
    return build_args(TrainArgs, changed(values, dict(case.changes)))


def run_case(name: str, case: Case, demo: DemoAssets, folder: Path, *, num_steps: int) -> dict[str, Any]:
    """Train a case in `folder/name`, which must be new.

    Returns:
        What was found and expected, losses at start and end, whether it diverged, extremes of the values.

    Raises:
        ConfigError: the folder is there already.
    """
    run_dir = folder / name
    with case.broken():
        problem = train_to_the_end(case_args(case, demo, run_dir, num_steps=num_steps))
    return _summary(case, diagnose_run(run_dir), problem)


def _summary(case: Case, diagnosis: Diagnosis, problem: str | None) -> dict[str, Any]:
    losses = [record.values["loss"] for record in read_records(diagnosis.run_dir, "train")]
    found = {finding.name for finding in diagnosis.findings}
    return {
        "title": case.title,
        "expected": sorted(case.expected),
        "found": sorted(found),
        "as_expected": found == case.expected,
        "first_step": {f.name: f.since for f in reversed(diagnosis.findings)},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "diverged": problem,
        "quantities": _extremes(diagnosis),
    }


def _extremes(diagnosis: Diagnosis) -> Mapping[str, Mapping[str, float]]:
    values = {}
    for quantity, places in diagnosis.series.items():
        numbers = [
            value
            for where, (_, series) in places.items()
            if where != "group ttt_alpha"  # not judged
            for value in series
            if math.isfinite(value)
        ]
        if numbers:
            values[quantity] = {"lowest": min(numbers), "highest": max(numbers)}
    return values
