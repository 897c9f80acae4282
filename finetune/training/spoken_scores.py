"""Spoken-language accuracies of a model while it trains, on pairs that are encoded once before."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from torch import Tensor

from finetune.args import TrainArgs
from finetune.distributed import alike, barrier, gather_objects, get_rank, get_world_size, is_main
from finetune.errors import DataError
from finetune.evaluation.spoken.accuracy import HEADLINE, SEMANTIC, mean_outcome, outcomes, scored_pairs
from finetune.evaluation.spoken.items import Benchmark, Split
from finetune.evaluation.spoken.likelihood import ItemScore, score_items
from finetune.evaluation.spoken.measure import EncodedPairs, MeasuredItems, collect, encode_pairs, take_ids
from finetune.evaluation.spoken.tasks import TASKS, find_tasks
from finetune.sharding import put_back_into_shards
from finetune.wrapped_model import autocast

logger = logging.getLogger(__name__)

_SPLIT: Split = "dev"
_SEED = 0  # of the subset: the same pairs in every run


@dataclass(frozen=True)
class _Speech:
    """What encoding needs of a model in training."""

    lm: LMModel
    mimi: MimiModel
    info: CheckpointInfo


def load_spoken(args: TrainArgs) -> list[Benchmark]:
    """The pairs of `eval.spoken`, no audio yet; empty where there is no `data`.

    Raises:
        DataError: the folder or a benchmark in it cannot be used; names the key.
    """
    spoken = args.eval.spoken
    if spoken.data is None:
        return []
    try:
        found = find_tasks(Path(spoken.data).expanduser(), spoken.tasks)
        whole = [TASKS[name].load(folder, _SPLIT) for name, folder in found.folders.items()]
    except DataError as error:
        raise DataError(f"eval.spoken.data: {error}") from None
    for name, reason in found.absent.items():
        logger.info("eval.spoken: %s is left out, %s.", name, reason)
    return [take_ids(benchmark, spoken.limit, seed=_SEED) for benchmark in whole]


class SpokenEvaluator:
    """Measures accuracies; every process has one and calls it together with the others.

    Args:
        args: the configuration.
        encoded: the benchmarks, the same in every process.
    """

    def __init__(self, args: TrainArgs, encoded: Sequence[EncodedPairs]) -> None:
        self._args = args
        self._encoded = encoded

    @classmethod
    def build(
        cls,
        args: TrainArgs,
        benchmarks: Sequence[Benchmark],
        info: CheckpointInfo,
        model: LMModel,
        mimi: MimiModel,
    ) -> "SpokenEvaluator | None":
        """Encode the items, in the main process first; the others find its codes in the cache.

        Returns:
            None without benchmarks.

        Raises:
            DataError: no pair of a benchmark can be used, or the cache cannot be written.
        """
        if not benchmarks:
            return None
        speech, encoded = _Speech(model, mimi, info), []
        with alike():
            if is_main():
                encoded = [_encode(args, benchmark, speech) for benchmark in benchmarks]
        barrier()
        with alike():
            if not is_main():
                encoded = [_encode(args, benchmark, speech) for benchmark in benchmarks]
        for each in encoded:
            logger.info(
                "eval.spoken: %s: %d pairs, %d items, %d failed.",
                each.name,
                len(each.pairs),
                len(each.codes),
                len(each.failures),
            )
            for name, reason in each.failures.items():
                logger.warning("eval.spoken: %s: left out %s: %s", each.name, name, reason)
        return cls(args, encoded)

    def is_due(self, step: int) -> bool:
        """Whether a measurement belongs after this step: every `freq` steps and at the end."""
        freq = self._args.eval.spoken.freq
        return step == self._args.max_steps or (freq > 0 and step % freq == 0)

    def measure(self, model: LMModel) -> dict[str, float]:
        """The accuracy of each task, by its name, and that of the semantic codebook alone.

        Leaves the model in training mode. Carried memories of the training are not touched: they are in the
        model during the passes of training only, and every item starts at `W0`.
        """
        model.eval()
        values: dict[str, float] = {}
        try:
            for encoded in self._encoded:
                likelihoods = encoded.of_all(self._score(model, encoded.distinct()))
                measured = collect(
                    encoded, likelihoods, semantic_weight=self._args.first_codebook_weight_multiplier
                )
                _warn_of_failures(encoded, measured)
                for name, kind in ((encoded.name, HEADLINE), (f"{encoded.name}_semantic", SEMANTIC)):
                    found = mean_outcome(outcomes(measured.pairs, measured.scores, kind))
                    values[name] = math.nan if found.value is None else found.value
        finally:
            put_back_into_shards(model)
            model.train()
        return values

    def _score(self, model: LMModel, codes: Mapping[str, Tensor]) -> dict[str, ItemScore]:
        """Likelihoods of all items by name; each process scores its share of every batch.

        A sharded model needs all processes in each pass, so a process without an item repeats one.
        """
        mine: dict[str, ItemScore] = {}
        device = next(model.parameters()).device
        for batch in self._batches(codes):
            names = batch[get_rank() :: get_world_size()] or batch[:1]
            rows = [codes[name] for name in names]
            frames = len(rows) * (max(row.shape[1] for row in rows) + max(model.delays))
            with autocast(self._args, device):
                scores = score_items(
                    model,
                    rows,
                    batch_size=len(rows),
                    max_frames_per_batch=frames,
                    conditions=self._args.eval.spoken.conditions,
                )
            mine |= dict(zip(names, scores, strict=True))
        return {name: score for part in gather_objects(mine) for name, score in part.items()}

    def _batches(self, codes: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of items for all processes, the longest first: each gets about the frames of a pass."""
        names = sorted(codes, key=lambda name: (-codes[name].shape[1], name))
        batches: list[list[str]] = []
        most = self._args.batch_size * self._args.chunk_frames
        while names:
            rows = max(1, most // codes[names[0]].shape[1])
            size = rows * get_world_size()
            batches.append(names[:size])
            names = names[size:]
        return batches


def _warn_of_failures(encoded: EncodedPairs, measured: MeasuredItems) -> None:
    names = sorted(measured.failures.keys() - encoded.failures.keys())
    if names:
        logger.warning(
            "eval.spoken: %s: %d items are left out, their log-likelihood is not finite: %s%s",
            encoded.name,
            len(names),
            ", ".join(names[:3]),
            ", …" if len(names) > 3 else "",
        )


def _encode(args: TrainArgs, benchmark: Benchmark, speech: _Speech) -> EncodedPairs:
    encoded = encode_pairs(benchmark, speech, cache_dir=args.data.cache_dir, cache_key="data.cache_dir")
    if not scored_pairs(encoded.pairs, encoded.codes.keys()):
        name, reason = next(iter(encoded.failures.items()))
        raise DataError(f"eval.spoken.data: no pair of {benchmark.name} can be used; {name}: {reason}")
    return encoded
