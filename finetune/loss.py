"""The one loss of training and evaluation: weighted cross-entropy of text and audio, kept apart.

Shapes: B batch rows, T frames, K audio codebooks that Moshi predicts (dep_q).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel, LMOutput
from torch import Tensor

from finetune.args import TrainArgs
from finetune.base_model.streams import model_streams


class LossWeights(NamedTuple):
    """Which targets there are, and the weight of each in its loss (0 where there is none)."""

    text: Tensor  # [B, 1, T]
    audio: Tensor  # [B, K, T]
    text_valid: Tensor  # [B, 1, T], bool
    audio_valid: Tensor  # [B, K, T], bool

    def totals(self) -> Tensor:
        """Sum of the text weights and of the audio weights, `[2]`."""
        return torch.stack([self.text.sum(), self.audio.sum()])


class LossSums(NamedTuple):
    """Sums over targets; divided by the matching totals they are means."""

    text: Tensor  # weighted, scalar
    audio: Tensor  # weighted, scalar
    text_nll: Tensor  # plain, scalar, nats
    text_count: Tensor
    audio_nll: Tensor  # plain, per codebook, [K], nats
    audio_count: Tensor  # [K]


def audio_targets(codes: Tensor, model: LMModel) -> Tensor:
    """The codebooks that Moshi predicts, `[B, K, T]`, of codes `[B, 1 + n_q, T]`."""
    return codes[:, model.audio_offset : model.audio_offset + model.dep_q]


def loss_weights(
    codes: Tensor, model: LMModel, args: TrainArgs, context: Tensor | None = None
) -> LossWeights:
    """Weights of the targets, known from the codes alone.

    A codebook delayed by d frames is predicted d frames later, so never in the last d frames of a pass. Zero
    tokens (padding) are no targets.

    Args:
        codes: `[B, 1 + n_q, T]`, text first.
        context: frames of each row before the chunk itself, `[B]`; counted is what is predicted in the
            `args.chunk_frames` frames after them. None: all frames count.
    """
    text, audio = codes[:, : model.audio_offset], audio_targets(codes, model)
    text_valid, audio_valid = text != model.zero_token_id, audio != model.zero_token_id
    delays = model.delays[: model.audio_offset + model.dep_q]
    frames = torch.arange(codes.shape[2], device=codes.device)
    first: Tensor | int = 0
    end: Tensor | int = codes.shape[2]
    if context is not None:
        first = context[:, None]
        end = (first + args.chunk_frames).clamp(max=codes.shape[2])
    for row, delay in zip((text_valid[:, 0], *audio_valid.unbind(1)), delays, strict=True):
        row &= (first <= frames + delay) & (frames + delay < end)
    if args.data.text == "none":
        text_valid = torch.zeros_like(text_valid)
    text_weights, audio_weights = text_valid.float(), audio_valid.float()
    for token in (model.text_padding_token_id, model.end_of_text_padding_id):
        text_weights = torch.where(text == token, text_weights * args.text_padding_weight, text_weights)
    semantic = slice(None, None, model_streams(model).num_codebooks)  # the first codebook of each voice
    audio_weights[:, semantic] *= args.first_codebook_weight_multiplier
    return LossWeights(text_weights, audio_weights, text_valid, audio_valid)


def loss_sums(output: LMOutput, codes: Tensor, weights: LossWeights, model: LMModel) -> LossSums:
    """Cross-entropy sums of a forward pass.

    Args:
        output: logits aligned with the codes; they may hold NaN where there is no target.
        codes: `[B, 1 + n_q, T]`.
        weights: of `loss_weights`.
    """
    text_losses = _token_losses(output.text_logits, codes[:, : model.audio_offset], weights.text_valid)
    audio_losses = _token_losses(output.logits, audio_targets(codes, model), weights.audio_valid)
    return weighted_sums(text_losses, audio_losses, weights)


def weighted_sums(text_losses: Tensor, audio_losses: Tensor, weights: LossWeights) -> LossSums:
    """Sums of the losses of single tokens, `[B, 1, T]` and `[B, K, T]`; those of no target do not count."""
    text_losses = torch.where(weights.text_valid, text_losses, 0)
    audio_losses = torch.where(weights.audio_valid, audio_losses, 0)
    return LossSums(
        (text_losses * weights.text).sum(),
        (audio_losses * weights.audio).sum(),
        text_losses.detach().sum(),
        weights.text_valid.sum(),
        audio_losses.detach().sum((0, 2)),
        weights.audio_valid.sum((0, 2)),
    )


def total_loss(sums: LossSums, totals: Tensor) -> Tensor:
    """Mean text loss plus mean audio loss.

    Args:
        totals: `[2]`, the weights' totals over everything that makes one step (all micro-batches and
            processes), so that the loss does not depend on how the step is cut up.
    """
    totals = totals.clamp(min=1e-12)
    return sums.text / totals[0] + sums.audio / totals[1]


def _token_losses(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    targets = torch.where(valid, targets, 0)
    return F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), reduction="none").view_as(valid)
