"""The simplest model of the data, token frequencies: what a trained model must beat."""

import logging

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.args import TrainArgs
from finetune.data.dataset import ChunkDataset
from finetune.distributed import all_reduce_sum, get_rank, get_world_size
from finetune.eval import LossAverage, eval_batches
from finetune.loss import audio_targets, loss_weights, weighted_sums

logger = logging.getLogger(__name__)

_MAX_CHUNKS = 10_000


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
    losses = average.result(model.dep_q)
    text, audio = losses["text_loss"], losses["audio_loss"]
    logger.info(
        "Unigram losses on the evaluation data (token frequencies alone): text %.3f, audio %.3f", text, audio
    )
    return {"unigram_text_loss": text, "unigram_audio_loss": audio}


def _count(counts: Tensor, tokens: Tensor, weights: Tensor) -> None:
    for row, token_row, weight_row in zip(counts, tokens.unbind(1), weights.unbind(1), strict=True):
        row.index_add_(0, token_row.clamp(min=0).flatten(), weight_row.double().flatten())


def _log_probs(counts: Tensor) -> Tensor:
    return (counts / counts.sum(-1, keepdim=True)).log().float()
