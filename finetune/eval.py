"""Evaluation on held-out chunks: text and audio loss apart, and true perplexities."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.conditions import prepare_conditions
from finetune.data.contiguous_sampler import follow_recordings
from finetune.data.dataset import Batch, ChunkDataset, build_eval_loader
from finetune.data.sampler import eval_rows
from finetune.distributed import all_reduce_sum, get_rank, get_world_size
from finetune.loss import LossSums, LossWeights, loss_sums, loss_weights
from finetune.sharding import put_back_into_shards
from finetune.training_memory import TrainingMemory
from finetune.wrapped_model import autocast


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

    def result(self, num_codebooks: int) -> dict[str, float]:
        """Means over everything added, in all processes.

        Returns:
            `text_loss` and `audio_loss` (weighted as in training, nats), `loss` (their sum),
            `text_perplexity` and `audio_perplexity` (exp of the plain mean), and the plain audio loss of
            the semantic codebook and of the acoustic ones.
        """
        sums = torch.zeros(6 + 2 * num_codebooks, dtype=torch.float64)
        if self._rows:
            for row in torch.stack(self._rows).cpu().double():  # on the CPU: not every device has float64
                sums += row
        text, audio, text_nll, text_count, text_weight, audio_weight, *rest = all_reduce_sum(sums).tolist()
        audio_nll, audio_count = rest[:num_codebooks], rest[num_codebooks:]
        text_loss, audio_loss = _ratio(text, text_weight), _ratio(audio, audio_weight)
        return {
            "loss": text_loss + audio_loss,
            "text_loss": text_loss,
            "audio_loss": audio_loss,
            "text_perplexity": _exp(_ratio(text_nll, text_count)),
            "audio_perplexity": _exp(_ratio(sum(audio_nll), sum(audio_count))),
            "semantic_loss": _ratio(audio_nll[0], audio_count[0]),
            "acoustic_loss": _ratio(sum(audio_nll[1:]), sum(audio_count[1:])),
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
    memory = TrainingMemory(model, device, chunk_frames=args.chunk_frames) if args.carries_memory else None
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
    return average.result(model.dep_q)


def _ratio(value: float, weight: float) -> float:
    # No target at all: there is no such loss, which is not the same as a loss of 0.
    return value / weight if weight > 0 else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
