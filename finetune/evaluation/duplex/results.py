"""What a measurement says: results.json and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.duplex.figures import FIGURES, TASKS, Figure
from finetune.evaluation.duplex.layout import SampleSet
from finetune.evaluation.duplex.measure import MeasuredSample, MeasuredSet
from finetune.evaluation.text_table import aligned

WER = "wer"
WER_FIGURE = Figure(
    "errors per word",
    "words that a recogniser hears wrongly, not at all, or where there are none, over the words of the "
    "model's text stream, summed over the samples in which it wrote some",
)


def results_json(
    sets: Sequence[SampleSet],
    measured: Mapping[str, MeasuredSet],
    *,
    bootstrap: RatioBootstrap,
    model: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json.

    Args:
        sets: what was measured.
        measured: by the name of the set.
        bootstrap: draws samples.
        model: its identity; None: outputs were given.
        settings: all options that the figures depend on.
    """
    entries = {each.name: _set_entry(each, measured[each.name], bootstrap) for each in sets}
    scores = {
        name: {figure: found["value"] for figure, found in entry["figures"].items()}
        for name, entry in entries.items()
    }
    failures = {name: why for each in measured.values() for name, why in each.failures.items()}
    return {
        "kind": "moshi-ttt duplex figures",
        "version": 1,
        "scores": scores,
        "sets": entries,
        "failures": failures,
        "model": None if model is None else dict(model),
        "settings": dict(settings),
        "definitions": {name: figure._asdict() for name, figure in {**FIGURES, WER: WER_FIGURE}.items()},
        "samples": {
            f"{name}/{id_}": _sample_entry(sample)
            for name, each in measured.items()
            for id_, sample in each.samples.items()
        },
    }


def result_lines(results: Mapping[str, Any]) -> list[str]:
    """A table per set: figures with their intervals, units, numbers of samples, and which way is better."""
    lines: list[str] = []
    for name, entry in results["sets"].items():
        title = f"{name}: {entry['title']} ({entry['task']}), {entry['num_samples']} samples"
        if entry["num_failures"]:
            title += f", {entry['num_failures']} failed"
        table = [["", "mean", "95 % interval", "samples", "better", "unit"]]
        for figure, found in entry["figures"].items():
            interval = found["interval"]
            shown = "—" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"
            value = "—" if found["value"] is None else f"{found['value']:.3f}"
            better = found["better"] or ""
            table.append([figure, value, shown, str(found["num_samples"]), better, found["unit"]])
        lines += ["", title, *aligned(table)]
    return lines


def _set_entry(samples: SampleSet, measured: MeasuredSet, bootstrap: RatioBootstrap) -> dict[str, Any]:
    task = TASKS[samples.task]
    figures = {}
    for name, aim in task.aims.items():
        values = [sample.values[name] for sample in measured.samples.values()]
        known = np.array([value for value in values if value is not None], dtype=float)
        figures[name] = _entry(known, np.ones(len(known)), FIGURES[name], aim, bootstrap)
    counts = [sample.errors for sample in measured.samples.values() if sample.errors is not None]
    if counts:
        written = [each for each in counts if each.num_words]
        errors = np.array([each.num_errors for each in written], dtype=float)
        words = np.array([each.num_words for each in written], dtype=float)
        figures[WER] = _entry(errors, words, WER_FIGURE, "lower", bootstrap)
    return {
        "task": samples.task,
        "title": task.title,
        "num_samples": len(measured.samples),
        "num_failures": len(measured.failures),
        "figures": figures,
    }


def _entry(
    numerators: np.ndarray,
    denominators: np.ndarray,
    figure: Figure,
    aim: str | None,
    bootstrap: RatioBootstrap,
) -> dict[str, Any]:
    """A ratio of sums with its interval over samples."""
    interval = bootstrap.interval(numerators, denominators)
    return {
        "value": float(numerators.sum() / denominators.sum()) if len(numerators) else None,
        "interval": None if interval is None else list(interval),
        "num_samples": len(numerators),
        "unit": figure.unit,
        "better": aim,
    }


def _sample_entry(sample: MeasuredSample) -> dict[str, Any]:
    speech = [[round(start, 3), round(end, 3)] for start, end in sample.speech.intervals]
    entry = {
        "figures": sample.values,
        "speech": speech,
        "num_words": None if sample.speech.words is None else len(sample.speech.words),
        "duration_sec": sample.speech.duration_sec,
    }
    return entry if sample.errors is None else entry | {WER: sample.errors.to_json()}
