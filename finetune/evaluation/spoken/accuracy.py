"""From the likelihoods of items to accuracies of pairs.

A pair counts 1 where its correct item scores higher, 0.5 where both score the same and else 0. The voices of
an id are averaged, then the ids, as in the evaluation of the ZeroSpeech Challenge 2021
(https://github.com/zerospeech/zerospeech2021, `lexical.py` and `syntactic.py`, `evaluate_by_pair`).

Shapes: K codebooks of Moshi's own voice, U ids.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.spoken.items import Pair
from finetune.evaluation.spoken.likelihood import ItemScore

COMBINED, COMBINED_SUM = "combined", "combined_sum"
SEMANTIC, SEMANTIC_SUM = "semantic", "semantic_sum"
HEADLINE = COMBINED
DEFINITIONS = {
    COMBINED: "the headline: log-likelihood of an item's codes, the semantic codebook times semantic_weight "
    "and each other one times 1, divided by the sum of the same weights over all codes: nats per code",
    COMBINED_SUM: "the same, not divided by the length of the item",
    SEMANTIC: "log-likelihood of the semantic codebook alone, per code",
    SEMANTIC_SUM: "the same, not divided by the length of the item",
    "codebook_<k>": "log-likelihood of one other codebook alone, per code; 2 is the first acoustic one",
    "accuracy": "share of pairs whose correct item scores higher, ties count half; mean over the voices of "
    "an id, then over ids",
    "interval": "95 % percentile bootstrap over ids",
    "difference": "accuracy of the first model minus that of the second, on the pairs that both have",
    "why the headline": "public evaluations of speech language models compare log-likelihoods per token "
    "(slp-rl/slamkit: mean_nll true by default), the ZeroSpeech 2021 baseline sums; both are here",
}

Scores = Mapping[str, Mapping[str, float]]  # item -> kind of score -> value


class Accuracy(NamedTuple):
    """An accuracy, or a difference of two.

    Attributes:
        value: 0 to 1 (a difference: -1 to 1), None where there is no pair.
        interval: 95 % bootstrap interval over ids, None with fewer than two.
        num_ids: that it is the mean of.
        num_pairs: of all voices.
    """

    value: float | None
    interval: tuple[float, float] | None
    num_ids: int
    num_pairs: int


class PairOutcome(NamedTuple):
    """What the pairs of an id are worth, the mean over so many voices."""

    value: float
    num_pairs: int


def item_scores(score: ItemScore, *, semantic_weight: float) -> dict[str, float]:
    """Every kind of score of an item, see `DEFINITIONS`; the higher, the likelier.

    Args:
        score: its log-likelihoods by codebook, the semantic one first.
        semantic_weight: of the semantic codebook, where an acoustic one has 1.
    """
    sums = score.log_likelihood.double().tolist()
    counts = score.num_tokens.double().tolist()
    weights = [semantic_weight] + [1.0] * (len(sums) - 1)
    total = sum(weight * value for weight, value in zip(weights, sums, strict=True))
    weighed = sum(weight * count for weight, count in zip(weights, counts, strict=True))
    scores = {COMBINED: _ratio(total, weighed), COMBINED_SUM: total}
    scores |= {SEMANTIC: _ratio(sums[0], counts[0]), SEMANTIC_SUM: sums[0]}
    for index in range(1, len(sums)):
        scores[f"codebook_{index + 1}"] = _ratio(sums[index], counts[index])
    return scores


def is_usable(scores: Mapping[str, float]) -> bool:
    """Whether every kind of score of an item is a finite number."""
    return all(map(math.isfinite, scores.values()))


def pair_outcome(correct: float, incorrect: float) -> float:
    """1 where the correct item scores higher, 0.5 at a tie, else 0."""
    assert math.isfinite(correct) and math.isfinite(incorrect)
    return 0.5 if correct == incorrect else float(correct > incorrect)


def outcomes(pairs: Iterable[Pair], scores: Scores, kind: str) -> dict[str, PairOutcome]:
    """The outcome of each id under one kind of score, the mean over its voices.

    Args:
        pairs: both items of each have scores.
        scores: by item.
        kind: which score decides.
    """
    by_id: dict[str, list[float]] = {}
    for pair in pairs:
        values = (scores[item.name][kind] for item in (pair.correct, pair.incorrect))
        by_id.setdefault(pair.id, []).append(pair_outcome(*values))
    return {id_: PairOutcome(sum(values) / len(values), len(values)) for id_, values in by_id.items()}


def accuracies(
    pairs: Sequence[Pair], scores: Scores, bootstrap: RatioBootstrap | None
) -> dict[str, Accuracy]:
    """Accuracy under every kind of score; arguments as in `outcomes`."""
    return {kind: mean_outcome(outcomes(pairs, scores, kind), bootstrap) for kind in _kinds(pairs, scores)}


def by_subtype(
    pairs: Sequence[Pair], scores: Scores, bootstrap: RatioBootstrap | None
) -> dict[str, Accuracy]:
    """Accuracy of the headline score by subtype, sorted; empty where there are no subtypes."""
    names = sorted({pair.subtype for pair in pairs} - {""})
    parts = {name: [pair for pair in pairs if pair.subtype == name] for name in names}
    return {name: mean_outcome(outcomes(part, scores, HEADLINE), bootstrap) for name, part in parts.items()}


def paired_differences(
    pairs: Sequence[Pair], ours: Scores, others: Scores, bootstrap: RatioBootstrap
) -> dict[str, Accuracy]:
    """Accuracy of one model minus that of another, id by id, under every kind of score.

    Args:
        pairs: both items of each have scores of both models.
        ours, others: scores by item.
        bootstrap: draws ids, the same for both.
    """
    differences = {}
    for kind in _kinds(pairs, ours):
        first, second = outcomes(pairs, ours, kind), outcomes(pairs, others, kind)
        paired = {
            id_: PairOutcome(outcome.value - second[id_].value, outcome.num_pairs)
            for id_, outcome in first.items()
        }
        differences[kind] = mean_outcome(paired, bootstrap)
    return differences


def mean_outcome(found: Mapping[str, PairOutcome], bootstrap: RatioBootstrap | None = None) -> Accuracy:
    """The mean over ids, each of the same weight; without a bootstrap there is no interval."""
    if not found:
        return Accuracy(None, None, 0, 0)
    values = np.array([outcome.value for outcome in found.values()])
    interval = None if bootstrap is None else bootstrap.interval(values, np.ones_like(values))
    num_pairs = sum(outcome.num_pairs for outcome in found.values())
    return Accuracy(float(values.mean()), interval, len(values), num_pairs)


def scored_pairs(pairs: Iterable[Pair], names: Collection[str]) -> list[Pair]:
    """The pairs of which both items are among the names."""
    return [pair for pair in pairs if pair.correct.name in names and pair.incorrect.name in names]


def _kinds(pairs: Sequence[Pair], scores: Scores) -> list[str]:
    return list(scores[pairs[0].correct.name]) if pairs else [HEADLINE]


def _ratio(value: float, count: float) -> float:
    return value / count if count > 0 else math.nan
