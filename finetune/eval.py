"""Evaluation on held-out chunks: text and audio loss apart, true perplexities, and what to beat.

That is the simplest model of the data, token frequencies (`UnigramModel`).
"""

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.base_model.conditions import prepare_conditions
from finetune.base_model.streams import Streams, model_streams
from finetune.data.batches.contiguous_sampler import follow_recordings
from finetune.data.batches.dataset import Batch, ChunkDataset
from finetune.data.batches.loader import build_eval_loader
from finetune.data.batches.shuffled_sampler import eval_rows
from finetune.distributed import all_reduce_sum, get_rank, get_world_size
from finetune.loss import LossSums, LossWeights, audio_targets, loss_sums, loss_weights, weighted_sums
from finetune.sharding import put_back_into_shards
from finetune.training.carried_memory import CarriedMemory
from finetune.wrapped_model import autocast

logger = logging.getLogger(__name__)
_MAX_CHUNKS = 10_000
_OF_TEXT = frozenset({"text_loss", "text_perplexity", "unigram_text_loss"})
_OF_AUDIO = frozenset(
    {"audio_loss", "audio_perplexity", "semantic_loss", "acoustic_loss", "unigram_audio_loss"}
)


class LossAverage:
    """Sums of losses and weights over batches and processes, divided once at the end."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def add(self, sums: LossSums, weights: LossWeights) -> None:
        """Add one batch, without waiting for the device."""
        row = torch.cat(
            [
                torch.stack([sums.text.detach(), sums.audio.detach(), sums.text_nll, sums.text_count]),
                weights.totals(),
                sums.audio_nll,
                sums.audio_count,
            ]
        )
        self._rows.append(row)

    def result(self, streams: Streams) -> dict[str, float]:
        """Means over everything added, in all processes.

        Args:
            streams: of the model.

        Returns:
            `text_loss` and `audio_loss` (weighted as in training, nats; NaN without a target), `loss` (their
            sum, or that of the audio alone),
            `text_perplexity` and `audio_perplexity` (exp of the plain mean), and the plain audio loss of
            the semantic codebook of each predicted voice and of the acoustic ones.
        """
        num_codebooks = streams.num_codebooks * streams.num_predicted
        sums = torch.zeros(6 + 2 * num_codebooks, dtype=torch.float64)
        if self._rows:
            for row in torch.stack(self._rows).cpu().double():  # on the CPU: not every device has float64
                sums += row
        text, audio, text_nll, text_count, text_weight, audio_weight, *rest = all_reduce_sum(sums).tolist()
        audio_nll, audio_count = rest[:num_codebooks], rest[num_codebooks:]
        semantic = slice(None, None, streams.num_codebooks)
        semantic_nll, semantic_count = sum(audio_nll[semantic]), sum(audio_count[semantic])
        text_loss, audio_loss = _ratio(text, text_weight), _ratio(audio, audio_weight)
        return {
            "loss": sum(loss for loss in (text_loss, audio_loss) if not math.isnan(loss)),
            "text_loss": text_loss,
            "audio_loss": audio_loss,
            "text_perplexity": _exp(_ratio(text_nll, text_count)),
            "audio_perplexity": _exp(_ratio(sum(audio_nll), sum(audio_count))),
            "semantic_loss": _ratio(semantic_nll, semantic_count),
            "acoustic_loss": _ratio(sum(audio_nll) - semantic_nll, sum(audio_count) - semantic_count),
        }


def eval_batches(data: ChunkDataset, args: TrainArgs) -> Iterator[tuple[list[int], Batch | None]]:
    """This process's share of all chunks; in all processes as many batches, some of them None.

    Yields:
        The lanes of the rows, which with carried memory follow recordings, and the batch.
    """
    split = {"batch_size": args.batch_size, "rank": get_rank(), "world_size": get_world_size()}
    if args.carries_memory:
        rows = follow_recordings(data.chunks, **split)
    else:
        rows = [list(enumerate(indices)) for indices in eval_rows(len(data), **split)]
    plan = [([lane for lane, _ in pairs], [index for _, index in pairs]) for pairs in rows]
    batches = iter(build_eval_loader(data, [indices for _, indices in plan if indices]))
    for lanes, indices in plan:
        yield lanes, next(batches) if indices else None


@torch.no_grad()
def evaluate(
    model: LMModel, data: ChunkDataset, args: TrainArgs, *, device: torch.device
) -> dict[str, float]:
    """Losses of the model over all chunks, see `LossAverage.result`. Leaves the model in training mode.

    Where training carries memory, so does evaluation, in memories of its own: those of the training stay as
    they are. Every process makes the same number of passes, since a sharded model needs all of them for each.
    """
    model.eval()
    average = LossAverage()
    memory = CarriedMemory(model, device, chunk_frames=args.chunk_frames) if args.carries_memory else None
    nothing = torch.full((1, model.num_codebooks, args.chunk_frames), model.zero_token_id)
    try:
        for lanes, batch in eval_batches(data, args):
            codes = (nothing if batch is None else batch.codes).to(device, non_blocking=True)
            context = None if batch is None else batch.context.to(device, non_blocking=True)
            conditions = prepare_conditions(model, [{}] if batch is None else batch.conditions)
            weights = loss_weights(codes, model, args, context)
            remembering: AbstractContextManager[None] = nullcontext()
            if memory is not None and batch is not None:
                remembering = memory.carried(lanes, batch)
            with remembering, autocast(args, device):
                output = model(codes, conditions)
            average.add(loss_sums(output, codes, weights, model), weights)
            if memory is not None:
                memory.commit()
    finally:
        put_back_into_shards(model)
        model.train()
    return average.result(model_streams(model))


def without_absent(values: dict[str, float], model: LMModel, args: TrainArgs) -> dict[str, float]:
    """Metrics without those of the text where none is trained, and of the audio where none is predicted."""
    absent: frozenset[str] = frozenset()
    if args.data.text == "none":
        absent |= _OF_TEXT
    if not model_streams(model).speaks:
        absent |= _OF_AUDIO
    return {name: value for name, value in values.items() if name not in absent}


def _ratio(value: float, weight: float) -> float:
    # No target at all: there is no such loss, which is not the same as a loss of 0.
    return value / weight if weight > 0 else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


class UnigramModel:
    """Frequencies of the text tokens and of each audio codebook, weighted as the loss weighs them.

    Args:
        text_counts: `[text_card]`.
        audio_counts: `[K, card]`.
    """

    def __init__(self, text_counts: Tensor, audio_counts: Tensor) -> None:
        # One count for every token: what never occurs in training stays possible.
        self.text_log_probs = _log_probs(text_counts + 1)  # [text_card]
        self.audio_log_probs = _log_probs(audio_counts + 1)  # [K, card]

    def losses(self, codes: Tensor, model: LMModel) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every text token `[B, 1, T]` and audio token `[B, K, T]`, nats.

        Args:
            codes: `[B, 1 + n_q, T]`; what is no token gets any value.
        """
        text = codes[:, : model.audio_offset].clamp(min=0)
        audio = audio_targets(codes, model).clamp(min=0)
        codebooks = torch.arange(model.dep_q)[:, None].expand_as(audio)
        return -self.text_log_probs[text], -self.audio_log_probs[codebooks, audio]


def fit_unigram(dataset: ChunkDataset, model: LMModel, args: TrainArgs) -> UnigramModel:
    """Count the training codes (evenly spaced chunks where there are more than 10,000)."""
    text = torch.zeros(model.text_card, dtype=torch.float64)
    audio = torch.zeros(model.dep_q, model.card, dtype=torch.float64)
    num_chunks = len(dataset)
    step = max(1, num_chunks // _MAX_CHUNKS)
    for index in range(get_rank() * step, num_chunks, step * get_world_size()):
        batch = dataset.batch([index])
        codes, weights = batch.codes, loss_weights(batch.codes, model, args, batch.context)
        _count(text[None], codes[:, : model.audio_offset], weights.text)
        _count(audio, audio_targets(codes, model), weights.audio)
    return UnigramModel(all_reduce_sum(text), all_reduce_sum(audio))


def unigram_losses(
    train_data: ChunkDataset, eval_data: ChunkDataset, model: LMModel, args: TrainArgs
) -> dict[str, float]:
    """Losses on the evaluation data of the frequencies in the training data.

    Returns:
        `unigram_text_loss` and `unigram_audio_loss`, weighted as the losses of training.
    """
    unigram = fit_unigram(train_data, model, args)
    average = LossAverage()
    for _, batch in eval_batches(eval_data, args):
        if batch is None:
            continue
        weights = loss_weights(batch.codes, model, args, batch.context)
        average.add(weighted_sums(*unigram.losses(batch.codes, model), weights), weights)
    losses = average.result(model_streams(model))
    found = {f"unigram_{name}": losses[name] for name in ("text_loss", "audio_loss")}
    shown = [
        f"{name.removeprefix('unigram_').removesuffix('_loss')} {loss:.3f}"
        for name, loss in without_absent(found, model, args).items()
    ]
    logger.info("Unigram losses on the evaluation data (token frequencies alone): %s", ", ".join(shown))
    return found


def _count(counts: Tensor, tokens: Tensor, weights: Tensor) -> None:
    for row, token_row, weight_row in zip(counts, tokens.unbind(1), weights.unbind(1), strict=True):
        row.index_add_(0, token_row.clamp(min=0).flatten(), weight_row.double().flatten())


def _log_probs(counts: Tensor) -> Tensor:
    return (counts / counts.sum(-1, keepdim=True)).log().float()
