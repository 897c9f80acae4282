"""What a measurement writes: results.json, files for the ZeroSpeech challenge, and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.long_context.identity import digest
from finetune.evaluation.spoken.accuracy import (
    COMBINED,
    COMBINED_SUM,
    DEFINITIONS,
    HEADLINE,
    SEMANTIC,
    SEMANTIC_SUM,
    accuracies,
    by_subtype,
    paired_differences,
    scored_pairs,
)
from finetune.evaluation.spoken.items import Pair
from finetune.evaluation.spoken.measure import Encoded, Measured
from finetune.evaluation.spoken.tasks import TASKS
from finetune.evaluation.text_table import aligned
from finetune.files import finite_or_null, write_json
from moshi_ttt.state_file import replacing

RESULTS_FILE = "results.json"
COMPARISON_FILE = "comparison.json"
SUBMISSION_DIR = "submission"
_SHOWN = (COMBINED, COMBINED_SUM, SEMANTIC, SEMANTIC_SUM)


def task_entry(measured: Measured, encoded: Encoded, bootstrap: RatioBootstrap) -> dict[str, Any]:
    """One task of results.json, its items not included."""
    measured_ids = {id(pair) for pair in measured.pairs}
    seconds = sum(likelihood.seconds for likelihood in measured.likelihoods.values())
    found = accuracies(measured.pairs, measured.scores, bootstrap)
    subtypes = by_subtype(measured.pairs, measured.scores, bootstrap)
    return {
        "headline": HEADLINE,
        "accuracy": {kind: accuracy._asdict() for kind, accuracy in found.items()},
        "by_subtype": {name: accuracy._asdict() for name, accuracy in subtypes.items()},
        "num_pairs": len(measured.pairs),
        "num_pairs_asked": measured.num_asked,
        "num_ids": len({pair.id for pair in measured.pairs}),
        "num_voices": len({pair.voice for pair in measured.pairs}),
        "excluded_pairs": [
            {"id": pair.id, "voice": pair.voice, "items": [pair.correct.name, pair.incorrect.name]}
            for pair in encoded.pairs
            if id(pair) not in measured_ids
        ],
        "failures": measured.failures,
        "seconds": seconds,
        "seconds_per_item": seconds / max(len(measured.likelihoods), 1),
    }


def item_entries(measured: Measured, codes_sha256: Mapping[str, str]) -> dict[str, Any]:
    """The likelihoods and scores of each item, by name."""
    return {
        name: {
            "num_frames": likelihood.num_frames,
            "log_likelihood": [finite_or_null(value) for value in likelihood.log_likelihood.tolist()],
            "num_tokens": likelihood.num_tokens.tolist(),
            "scores": measured.scores.get(name),
            "seconds": likelihood.seconds,
            "codes_sha256": codes_sha256[name],
        }
        for name, likelihood in sorted(measured.likelihoods.items())
    }


def data_fingerprint(codes_sha256: Mapping[str, str]) -> str:
    """What was measured: a digest of all names and codes."""
    return digest(dict(codes_sha256))


def results_json(
    tasks: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Mapping[str, Any]],
    *,
    absent: Mapping[str, str],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json of one model."""
    return {
        "kind": "moshi-ttt spoken scores",
        "version": 1,
        "scores": {name: entry["accuracy"][HEADLINE]["value"] for name, entry in tasks.items()},
        "tasks": dict(tasks),
        "absent": dict(absent),
        "model": dict(model),
        "settings": dict(settings),
        "definitions": DEFINITIONS,
        "items": dict(items),
    }


def comparison_json(
    first: Mapping[str, Measured],
    second: Mapping[str, Measured],
    *,
    models: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    bootstrap: RatioBootstrap,
) -> dict[str, Any]:
    """comparison.json: accuracies of two models on the pairs that both have, and their differences."""
    tasks = {}
    for name, ours in first.items():
        others = second[name]
        pairs = scored_pairs(ours.pairs, {item for pair in others.pairs for item in _names(pair)})
        kept = {
            "first": accuracies(pairs, ours.scores, bootstrap),
            "second": accuracies(pairs, others.scores, bootstrap),
            "difference": paired_differences(pairs, ours.scores, others.scores, bootstrap),
        }
        tasks[name] = {
            part: {kind: accuracy._asdict() for kind, accuracy in found.items()}
            for part, found in kept.items()
        }
    return {
        "kind": "moshi-ttt spoken scores compared",
        "version": 1,
        "differences": {name: entry["difference"][HEADLINE]["value"] for name, entry in tasks.items()},
        "tasks": tasks,
        "models": [dict(model) for model in models],
        "settings": dict(settings),
        "definitions": DEFINITIONS,
    }


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, complete or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            write_json(partial, value)
    except OSError as error:
        raise ConfigError(f"--out: {path}: cannot be written: {error.strerror}.") from None


def write_submission(
    folder: Path, measured: Measured, *, split: str, complete: bool
) -> dict[str, Any] | None:
    """The headline scores of a task as the ZeroSpeech Challenge 2021 wants them, None for other tasks.

    A line is `<filename> <score>`, in `lexical/dev.txt`, `syntactic/dev.txt` and the same for `test`
    (https://zerospeech.com/challenge_archive/2021/04_instructions).

    Args:
        folder: of the results.
        measured: what was measured.
        split: of the data.
        complete: whether it is the whole data set, which the challenge wants.

    Raises:
        ConfigError: it cannot be written.
    """
    place = TASKS[measured.name].submission
    if place is None:
        return None
    path = folder / SUBMISSION_DIR / place / f"{split}.txt"
    lines = [f"{name} {scores[HEADLINE]!r}\n" for name, scores in sorted(measured.scores.items())]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: {path}: cannot be written: {error.strerror}.") from None
    file = path.relative_to(folder).as_posix()
    return {"file": file, "num_items": len(lines), "complete": complete and not measured.failures}


def score_lines(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tables of the accuracies, and of the headline by subtype."""
    table = [["", *_SHOWN, "ids", "pairs", "failed"]]
    for name, entry in tasks.items():
        cells = [_cell(entry["accuracy"].get(kind)) for kind in _SHOWN]
        counts = (entry["num_ids"], entry["num_pairs"], len(entry["failures"]))
        table.append([name, *cells, *map(str, counts)])
    lines = ["", f"accuracy in %, 95 % intervals over ids; the headline is {HEADLINE}", *aligned(table)]
    rows = [
        [f"{name} {subtype}", _cell(found), str(found["num_ids"])]
        for name, entry in tasks.items()
        for subtype, found in entry["by_subtype"].items()
    ]
    if rows:
        lines += ["", f"{HEADLINE} by subtype", *aligned([["", HEADLINE, "ids"], *rows])]
    return lines


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """A table of both models and their differences, under the headline and the semantic score."""
    table = [["", "first", "second", "difference", "ids"]]
    for name, entry in comparison["tasks"].items():
        for kind in (HEADLINE, SEMANTIC):
            first, second, difference = (entry[part].get(kind) for part in ("first", "second", "difference"))
            if difference is not None:
                cells = [_cell(first), _cell(second), _cell(difference, signed=True)]
                table.append([f"{name} {kind}", *cells, str(difference["num_ids"])])
    return ["", "accuracy in % on the same pairs, 95 % intervals over ids", *aligned(table)]


def _cell(found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if found is None or found["value"] is None:
        return "—"
    spec = "+.1f" if signed else ".1f"
    text = f"{100 * found['value']:{spec}}"
    if found["interval"] is None:
        return text
    low, high = (f"{100 * edge:{spec}}" for edge in found["interval"])
    return f"{text} [{low}, {high}]"


def _names(pair: Pair) -> tuple[str, str]:
    return pair.correct.name, pair.incorrect.name
