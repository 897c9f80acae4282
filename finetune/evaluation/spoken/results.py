"""What a measurement says: results.json, comparison.json, lines for the ZeroSpeech challenge, and tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.spoken.accuracy import (
    COMBINED,
    COMBINED_SUM,
    DEFINITIONS,
    HEADLINE,
    SEMANTIC,
    SEMANTIC_SUM,
    accuracies,
    by_subtype,
    pair_outcome,
    paired_differences,
    scored_pairs,
)
from finetune.evaluation.spoken.items import Pair
from finetune.evaluation.spoken.measure import EncodedPairs, MeasuredItems
from finetune.evaluation.spoken.tasks import TASKS
from finetune.evaluation.text_table import aligned
from finetune.files import finite_or_null, hash_json

_SHOWN = (COMBINED, COMBINED_SUM, SEMANTIC, SEMANTIC_SUM)


def task_entry(
    measured: MeasuredItems, encoded: EncodedPairs, bootstrap: RatioBootstrap | None
) -> dict[str, Any]:
    """One task of results.json, without its items and pairs; without a bootstrap there are no intervals."""
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


def item_entries(measured: MeasuredItems, codes_sha256: Mapping[str, str]) -> dict[str, Any]:
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


def pair_entries(measured: MeasuredItems) -> list[dict[str, Any]]:
    """The pairs whose items have scores, and their outcomes under the headline."""
    return [
        {
            "id": pair.id,
            "voice": pair.voice,
            "subtype": pair.subtype,
            "correct": pair.correct.name,
            "incorrect": pair.incorrect.name,
            "outcome": pair_outcome(*(measured.scores[name][HEADLINE] for name in _names(pair))),
        }
        for pair in measured.pairs
    ]


def data_fingerprint(pairs: Sequence[Pair], codes_sha256: Mapping[str, str]) -> str:
    """What was measured: a digest of all pairs, of which item is the correct one, and of all codes."""
    listed = [[pair.id, pair.voice, pair.subtype, *_names(pair)] for pair in pairs]
    return hash_json({"pairs": sorted(listed), "codes": dict(codes_sha256)})[:16]


def results_json(
    *,
    tasks: Mapping[str, Mapping[str, Any]],
    items: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[str, Sequence[Any]],
    absent: Mapping[str, str],
    model: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json of one model; items, pairs and tasks are by the task's name."""
    return {
        "kind": "moshi-ttt spoken scores",
        "version": 1,
        "scores": {name: entry["accuracy"][HEADLINE]["value"] for name, entry in tasks.items()},
        "tasks": dict(tasks),
        "absent": dict(absent),
        "model": dict(model),
        "settings": dict(settings),
        "definitions": DEFINITIONS,
        "pairs": dict(pairs),
        "items": dict(items),
    }


def comparison_json(
    measured: tuple[Mapping[str, MeasuredItems], Mapping[str, MeasuredItems]],
    tasks: tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Mapping[str, Any]]],
    *,
    models: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    bootstrap: RatioBootstrap,
) -> dict[str, Any]:
    """comparison.json: accuracies of two models on the pairs that both have, and their differences.

    Args:
        measured: of the first and the second model, by task.
        tasks: the same as in their results.json.
        models: their identities.
        settings: of both.
        bootstrap: draws ids, the same for both.
    """
    compared: dict[str, dict[str, Any]] = {}
    for name, ours in measured[0].items():
        others, entries = measured[1][name], [part[name] for part in tasks]
        pairs = scored_pairs(ours.pairs, {item for pair in others.pairs for item in _names(pair)})
        found = {
            "first": accuracies(pairs, ours.scores, bootstrap),
            "second": accuracies(pairs, others.scores, bootstrap),
            "difference": paired_differences(pairs, ours.scores, others.scores, bootstrap),
        }
        excluded = {
            (pair["id"], pair["voice"], *pair["items"]): pair
            for entry in entries
            for pair in entry["excluded_pairs"]
        }
        compared[name] = {
            part: {kind: accuracy._asdict() for kind, accuracy in by_kind.items()}
            for part, by_kind in found.items()
        } | {
            "data": [entry["data"] for entry in entries],
            "failures": [entry["failures"] for entry in entries],
            "excluded_pairs": list(excluded.values()),
        }
    return {
        "kind": "moshi-ttt spoken scores compared",
        "version": 1,
        "differences": {name: entry["difference"][HEADLINE]["value"] for name, entry in compared.items()},
        "tasks": compared,
        "models": [dict(model) for model in models],
        "settings": dict(settings),
        "definitions": DEFINITIONS,
    }


def submission_file(task: str, *, split: str) -> str | None:
    """Where the ZeroSpeech Challenge 2021 wants the scores of a task, None outside it."""
    place = TASKS[task].submission
    return None if place is None else f"{place}/{split}.txt"


def submission_lines(measured: MeasuredItems) -> list[str]:
    """Lines of names and headline scores, sorted."""
    return [f"{name} {scores[HEADLINE]!r}\n" for name, scores in sorted(measured.scores.items())]


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
