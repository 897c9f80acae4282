"""Encoding and scoring the items of a benchmark, each failure by its name.

Shapes: K codebooks of Moshi's own voice, T frames.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from moshi.models.lm import LMModel
from torch import Tensor
from tqdm import tqdm

from finetune.base_model.conditions import TextConditions
from finetune.errors import ConfigError
from finetune.evaluation.spoken.accuracy import Scores, is_usable, item_scores, scored_pairs
from finetune.evaluation.spoken.encoding import SpokenModel, TextMode, UserMode, encode_items
from finetune.evaluation.spoken.items import Benchmark, Item, Pair
from finetune.evaluation.spoken.likelihood import ItemScore, score_items


@dataclass(frozen=True)
class EncodedPairs:
    """A benchmark whose items have been encoded.

    Attributes:
        name: of the task.
        pairs: all of them, those with failed items too.
        codes: by item name, `[1 + n_q, T]`.
        failures: why items or pairs are left out, by name.
    """

    name: str
    pairs: list[Pair]
    codes: dict[str, Tensor]
    failures: dict[str, str]

    def codes_sha256(self) -> dict[str, str]:
        """A digest of the codes of each item, by name."""
        return {name: item_codes_digest(codes) for name, codes in self.codes.items()}

    def distinct(self) -> dict[str, Tensor]:
        """Codes without repetition, each by the first item that has them."""
        return {names[0]: self.codes[names[0]] for names in self._alike()}

    def of_all(self, scores: Mapping[str, ItemScore]) -> dict[str, ItemScore]:
        """The scores of all items from those of `distinct`, in the order of `codes`.

        The same codes score exactly the same, which in different batches they would not: a pair of equal
        recordings is a tie. The seconds are shared.
        """
        found = {
            name: replace(scores[names[0]], seconds=scores[names[0]].seconds / len(names))
            for names in self._alike()
            for name in names
        }
        return {name: found[name] for name in self.codes}

    def _alike(self) -> list[list[str]]:
        """Names of items by their codes."""
        groups: dict[str, list[str]] = {}
        for name, digest in self.codes_sha256().items():
            groups.setdefault(digest, []).append(name)
        return list(groups.values())


@dataclass(frozen=True)
class MeasuredItems:
    """The scores of one model.

    Attributes:
        name: of the task.
        pairs: of which both items have usable scores.
        num_asked: pairs that there would be without failures of items.
        likelihoods: of every item that was scored, by name.
        scores: of the items with finite scores, by name and kind.
        failures: why items or pairs are left out, by name.
    """

    name: str
    pairs: list[Pair]
    num_asked: int
    likelihoods: dict[str, ItemScore]
    scores: Scores
    failures: dict[str, str]


def take_ids(benchmark: Benchmark, limit: int | None, *, seed: int) -> Benchmark:
    """The pairs of the first `limit` ids after a seeded shuffle, in the order of the benchmark.

    The ids are sorted before, so that they do not depend on the order of a file; None takes all. Failures of
    other ids, and those whose id is not known, are no part of a subset.
    """
    ids = sorted({pair.id for pair in benchmark.pairs})
    if limit is None or limit >= len(ids):
        return benchmark
    order = np.random.default_rng(seed).permutation(len(ids))
    kept = {ids[index] for index in order[:limit]}
    failed_ids = {name: id_ for name, id_ in benchmark.failed_ids.items() if id_ in kept}
    return replace(
        benchmark,
        pairs=[pair for pair in benchmark.pairs if pair.id in kept],
        failures={name: benchmark.failures[name] for name in failed_ids},
        failed_ids=failed_ids,
    )


def item_codes_digest(codes: Tensor) -> str:
    """SHA-256 of codes, `[1 + n_q, T]`."""
    return hashlib.sha256(codes.cpu().contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def items_of(pairs: Sequence[Pair]) -> list[Item]:
    """The items of pairs, each once."""
    return list({item.name: item for pair in pairs for item in (pair.correct, pair.incorrect)}.values())


def encode_pairs(
    benchmark: Benchmark,
    speech: SpokenModel,
    *,
    user: UserMode = "empty",
    text: TextMode = "none",
    cache_dir: str | None = None,
    cache_key: str = "--cache-dir",
    progress: bool = False,
) -> EncodedPairs:
    """Encode a benchmark's items with a model's codec, see `encode_items`; what cannot be read is a failure.

    Raises:
        DataError: the cache cannot be written.
    """
    items = items_of(benchmark.pairs)
    codes, failures = encode_items(
        items, speech, user=user, text=text, cache_dir=cache_dir, cache_key=cache_key, progress=progress
    )
    found = {item.name: row for item, row in zip(items, codes, strict=True) if row is not None}
    return EncodedPairs(
        benchmark.name, list(benchmark.pairs), found, dict(benchmark.failures) | dict(failures)
    )


def measure_items(
    lm: LMModel,
    encoded: EncodedPairs,
    *,
    semantic_weight: float,
    batch_size: int,
    max_frames_per_batch: int,
    prompt: Tensor | None = None,
    conditions: TextConditions | None = None,
    progress: bool = False,
) -> MeasuredItems:
    """Score every item of a benchmark, those with the same codes once.

    Args:
        lm: in evaluation mode.
        encoded: the benchmark.
        semantic_weight: of the semantic codebook, see `item_scores`.
        batch_size, max_frames_per_batch, prompt, conditions: see `score_items`.
        progress: show a bar.

    Raises:
        ConfigError: a batch does not fit into memory.
    """
    distinct = encoded.distinct()
    with tqdm(total=len(distinct), unit="item", disable=not progress, leave=False) as bar:
        bar.set_description(encoded.name)
        try:
            found = score_items(
                lm,
                list(distinct.values()),
                batch_size=batch_size,
                max_frames_per_batch=max_frames_per_batch,
                prompt=prompt,
                conditions=conditions,
                on_items=bar.update,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise ConfigError(
                f"--batch-size: {batch_size} items at once do not fit into memory; take fewer."
            ) from None
    likelihoods = encoded.of_all(dict(zip(distinct, found, strict=True)))
    return collect(encoded, likelihoods, semantic_weight=semantic_weight)


def collect(
    encoded: EncodedPairs, likelihoods: dict[str, ItemScore], *, semantic_weight: float
) -> MeasuredItems:
    """Score from likelihoods; an item whose scores are not finite is a failure, and so are its pairs."""
    scores, failures = {}, dict(encoded.failures)
    for name, likelihood in likelihoods.items():
        found = item_scores(likelihood, semantic_weight=semantic_weight)
        if is_usable(found):
            scores[name] = found
        else:
            failures[name] = "its log-likelihood under the model is not finite"
    pairs = scored_pairs(encoded.pairs, scores.keys())
    return MeasuredItems(encoded.name, pairs, len(encoded.pairs), likelihoods, scores, failures)
