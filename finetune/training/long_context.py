"""Losses along long recordings of a model while it trains, with its memory on."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from moshi.models import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from sentencepiece import SentencePieceProcessor

from finetune.args import TrainArgs
from finetune.base_model.locate import lm_config
from finetune.base_model.text import load_tokenizer
from finetune.distributed import alike, barrier, is_main
from finetune.errors import DataError
from finetune.evaluation.long_context.statistics import Bootstrap, mean_ratio, slope_ratio, thirds
from finetune.evaluation.long_context.stream_losses import stream_losses
from finetune.evaluation.long_context.streams import OpenedStreams, Stream, StreamOptions, open_streams
from finetune.evaluation.sources import find_sources
from finetune.training.speaking_copy import speaking_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Speech:
    """What streams need of a model in training."""

    lm: LMModel
    mimi: MimiModel
    tokenizer: SentencePieceProcessor


def check_long_context(args: TrainArgs) -> None:
    """See that there are recordings for `eval.long_context`; no audio yet.

    Raises:
        DataError: there are none; names the key.
    """
    if args.eval.long_context.data is not None:
        with _naming_the_key():
            find_sources(args.eval.long_context.data)


class LongContextEvaluator:
    """Measures losses by position; every process has one and calls it together with the others.

    Args:
        args: the configuration.
        streams: the recordings; none in processes other than the main one, which measures.
    """

    def __init__(self, args: TrainArgs, streams: Sequence[Stream]) -> None:
        self._args = args
        self._streams = streams

    @classmethod
    def build(
        cls, args: TrainArgs, info: CheckpointInfo, model: LMModel, mimi: MimiModel
    ) -> "LongContextEvaluator | None":
        """Encode the recordings that are not in the cache yet.

        Returns:
            None without `data`.

        Raises:
            DataError: no recording can be used, or the cache cannot be written.
        """
        options = args.eval.long_context
        if options.data is None:
            return None
        streams: list[Stream] = []
        with alike():
            if is_main():
                speech = _Speech(model, mimi, load_tokenizer(info, lm_config(info)))
                opened = _open(args, options.data, speech, info)
                for name, reason in opened.failures.items():
                    logger.warning("eval.long_context: left out %s: %s", name, reason)
                streams = opened.streams
                frames = sum(stream.num_frames for stream in streams)
                logger.info("eval.long_context: %d recordings, %d frames.", len(streams), frames)
        barrier()
        return cls(args, streams)

    def is_due(self, step: int) -> bool:
        """Whether a measurement belongs after this step: every `freq` steps and at the end."""
        freq = self._args.eval.long_context.freq
        return step == self._args.max_steps or (freq > 0 and step % freq == 0)

    def measure(self, model: LMModel) -> dict[str, float]:
        """The mean audio loss, and its slopes over the whole and its thirds in nats per 1,000 frames.

        The main process streams the recordings through a copy of the model; the others wait. Nothing of the
        training changes.

        Returns:
            `long_context_loss`, `long_context_slope` and `long_context_slope_early`, `_middle`, `_late`;
            empty in the other processes.
        """
        speaker = speaking_copy(self._args, model)
        values: dict[str, float] = {}
        with alike():
            if speaker is not None:
                losses = {stream.name: self._losses(speaker, stream) for stream in self._streams}
                values = _scores(losses)
        del speaker
        barrier()
        return values

    def _losses(self, speaker: LMModel, stream: Stream) -> np.ndarray:
        """`[N]`, the mean of all codebooks at each frame."""
        losses = stream_losses(
            speaker,
            stream,
            chunk_frames=self._args.chunk_frames,
            conditions=self._args.eval.long_context.conditions,
        )
        return losses.metrics()["audio"].numpy()


def _open(args: TrainArgs, data: str, speech: _Speech, info: CheckpointInfo) -> OpenedStreams:
    options = args.eval.long_context
    streams_are = StreamOptions(
        user=options.user,
        text=options.text,
        max_frames=options.max_frames,
        max_streams=options.limit,
        cache_dir=args.data.cache_dir,
        cache_key="data.cache_dir",
        placing=args.text_options,
    )
    with _naming_the_key():
        return open_streams(data, streams_are, speech, info)


@contextmanager
def _naming_the_key() -> Iterator[None]:
    """Errors about `--data` of the command are about a key of the configuration here."""
    try:
        yield
    except DataError as error:
        raise DataError(f"eval.long_context.data: {str(error).removeprefix('--data: ')}") from None


def _scores(losses: Mapping[str, np.ndarray]) -> dict[str, float]:
    for name, each in losses.items():
        if np.isinf(each).any():
            logger.warning("eval.long_context: left out %s, its losses are not finite.", name)
    usable = [each for each in losses.values() if not np.isinf(each).any()]
    longest = max(map(len, usable), default=0)
    ratios = {"loss": mean_ratio(usable), "slope": slope_ratio(usable, 0, longest)}
    ratios |= {f"slope_{name}": slope_ratio(usable, *edges) for name, edges in thirds(longest).items()}
    found = {name: Bootstrap(num_resamples=1).estimate(ratio).value for name, ratio in ratios.items()}
    return {f"long_context_{name}": math.nan if value is None else value for name, value in found.items()}
