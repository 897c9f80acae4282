"""The simplest model of the data, token frequencies: what a trained model must beat."""

import torch
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor

from finetune.args import TrainArgs
from finetune.data.dataset import ChunkDataset
from finetune.distributed import all_reduce_sum, get_rank, get_world_size
from finetune.loss import audio_targets, loss_weights

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

    def output(self, codes: Tensor) -> LMOutput:
        """The same prediction in every frame, as the logits of an `LMModel` for codes `[B, 1 + n_q, T]`."""
        batch_size, _, num_frames = codes.shape
        text = self.text_log_probs.expand(batch_size, 1, num_frames, -1)
        audio = self.audio_log_probs[:, None].expand(batch_size, -1, num_frames, -1)
        everywhere = torch.ones((), dtype=torch.bool)
        return LMOutput(audio, everywhere.expand(audio.shape[:-1]), text, everywhere.expand(text.shape[:-1]))


def fit_unigram(dataset: ChunkDataset, model: LMModel, args: TrainArgs) -> UnigramModel:
    """Count the training codes (evenly spaced chunks where there are more than 10,000)."""
    text = torch.zeros(model.text_card, dtype=torch.float64)
    audio = torch.zeros(model.dep_q, model.card, dtype=torch.float64)
    num_chunks = len(dataset)
    step = max(1, num_chunks // _MAX_CHUNKS)
    for index in range(get_rank() * step, num_chunks, step * get_world_size()):
        codes = dataset[index][None]
        weights = loss_weights(codes, model, args)
        _count(text[None], codes[:, : model.audio_offset], weights.text)
        _count(audio, audio_targets(codes, model), weights.audio)
    return UnigramModel(all_reduce_sum(text), all_reduce_sum(audio))


def _count(counts: Tensor, tokens: Tensor, weights: Tensor) -> None:
    for row, token_row, weight_row in zip(counts, tokens.unbind(1), weights.unbind(1), strict=True):
        row.index_add_(0, token_row.clamp(min=0).flatten(), weight_row.double().flatten())


def _log_probs(counts: Tensor) -> Tensor:
    return (counts / counts.sum(-1, keepdim=True)).log().float()
