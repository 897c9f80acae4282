"""How likely a model finds recordings: the log-probability of every token of Moshi's own stream.

A step predicts before it hears, as in `LMModel.forward`: the first frame is predicted from the start token,
and codebook k with delay d predicts frame f in step f + d. So N frames take N + max(delays) steps, and no
token is left out. Attention and memory are causal, and a step whose tokens are all zero teaches the memory
nothing: what is filled up on the right of a shorter item changes nothing before it.

Shapes: B batch rows, N frames of an item, P frames of the prompt, T frames of a batch, S = T + max(delays)
steps, K codebooks of Moshi's own voice, n_q audio codebooks in all.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from torch import Tensor

from finetune.base_model.conditions import TextConditions, fused_conditions, prepare_conditions
from moshi_ttt.hybrid_model import non_finite_resets, ttt_layers


@dataclass(frozen=True)
class ItemScore:
    """What a model makes of one item.

    Attributes:
        num_frames: N.
        log_likelihood: `[K]` float64 on the CPU, by codebook of Moshi's own stream: the sum of log p over
            the frames, in nats. NaN or infinite where the model's is.
        num_tokens: `[K]` int64 on the CPU, how many tokens that are.
        seconds: the item's share of its batch's time, by steps.
    """

    num_frames: int
    log_likelihood: Tensor
    num_tokens: Tensor
    seconds: float


@torch.no_grad()
def score_items(
    lm: LMModel,
    codes: Sequence[Tensor],
    *,
    batch_size: int,
    max_frames_per_batch: int,
    prompt: Tensor | None = None,
    conditions: TextConditions | None = None,
    on_items: Callable[[int], None] | None = None,
) -> list[ItemScore]:
    """Score items, each by itself: memory starts at `W0` for every one.

    Batch size, order and padding change the scores by rounding only.

    Args:
        lm: in evaluation mode, not streaming. The caller chooses autocast.
        codes: `[1 + n_q, N]` each, N >= 1. Zero tokens are no targets. Where the text row holds
            `lm.ungenerated_token_id`, the model's own text is put in, greedily and step by step, until the
            last token of the item is predicted.
        batch_size: at most so many rows per pass.
        max_frames_per_batch: at most so many steps per pass, padding and prompt included; a longer item is
            a batch of its own.
        prompt: `[1 + n_q, P]`, a recording in front of every item, in the same pass, so that attention and
            memory have met it; its own tokens do not count.
        conditions: texts that a model with conditions is told with every item.
        on_items: called after each batch with its number of items.

    Returns:
        In the order of `codes`.
    """
    assert not lm.training and lm.depformer is not None and not lm.is_streaming
    if min(batch_size, max_frames_per_batch) < 1:
        raise ValueError(f"batch_size {batch_size} and max_frames_per_batch {max_frames_per_batch}: below 1.")
    for row in codes:
        if row.shape[0] != lm.num_codebooks or row.shape[1] == 0:
            raise ValueError(f"codes {list(row.shape)}: must be [{lm.num_codebooks}, N] with N >= 1.")
    if prompt is None:
        prompt = torch.empty((lm.num_codebooks, 0), dtype=torch.long)
    extra = prompt.shape[1] + max(lm.delays)
    scores: list[ItemScore | None] = [None] * len(codes)
    lengths = [row.shape[1] + extra for row in codes]
    for batch in _batches(lengths, batch_size=batch_size, max_steps=max_frames_per_batch):
        start = time.perf_counter()
        rows = [torch.cat([prompt.cpu(), codes[index].cpu()], 1) for index in batch]
        log_probs = _log_probs(
            lm, rows, conditions or {}, start=prompt.shape[1]
        ).cpu()  # waits for the device
        seconds = (time.perf_counter() - start) / sum(lengths[index] for index in batch)
        for index, values in zip(batch, log_probs, strict=True):
            scores[index] = _score(lm, codes[index], values, seconds * lengths[index])
        if on_items is not None:
            on_items(len(batch))
    return [score for score in scores if score is not None]


def _batches(lengths: Sequence[int], *, batch_size: int, max_steps: int) -> Iterator[list[int]]:
    """Yield indices of items of similar length, the longest first, so that too much memory fails early."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        full = len(batch) == batch_size
        if batch and (full or lengths[batch[0]] * (len(batch) + 1) > max_steps):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _own(lm: LMModel) -> slice:
    """The rows of codes that count: Moshi's own voice, as far as the model predicts it."""
    return slice(lm.audio_offset, lm.audio_offset + min(lm.dep_q, lm.n_q // 2))


def _score(lm: LMModel, codes: Tensor, log_probs: Tensor, seconds: float) -> ItemScore:
    """Sum log-probabilities `[K, >= N]` of an item's own tokens, `[1 + n_q, N]`."""
    targets = codes[_own(lm)].cpu()
    valid = targets != lm.zero_token_id
    values = log_probs[:, : codes.shape[1]].double().masked_fill(~valid, 0)
    return ItemScore(codes.shape[1], values.sum(1), valid.sum(1), seconds)


def _log_probs(lm: LMModel, rows: Sequence[Tensor], conditions: TextConditions, *, start: int) -> Tensor:
    """Log-probabilities of the own tokens from frame `start` on, `[B, K, T - start]`, at least float32.

    Where there is no token, the value means nothing.
    """
    codes, owns_text = _pad(lm, rows)
    if owns_text:
        with lm.streaming(len(rows)):
            logits, broken = _logits_with_own_text(lm, codes, conditions)
    else:
        logits, broken = lm(codes, prepare_conditions(lm, [conditions] * len(rows))).logits, None
    frames = slice(start, max(row.shape[1] for row in rows))
    targets = codes[:, _own(lm), frames]
    logits = logits[:, : targets.shape[1], frames]  # [B, K, T - start, card]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, -1, dtype=dtype)
    log_probs = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return log_probs if broken is None else log_probs.masked_fill(broken[:, None, None], math.nan)


def _pad(lm: LMModel, rows: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Rows with zero tokens on the right, `[B, 1 + n_q, S]`, and whether the model is to write text.

    Its text goes on until the last codebook of the row is predicted.
    """
    num_steps = max(row.shape[1] for row in rows) + max(lm.delays)
    codes = torch.full((len(rows), lm.num_codebooks, num_steps), lm.zero_token_id)
    for padded, row in zip(codes, rows, strict=True):
        num_frames = row.shape[1]
        padded[:, :num_frames] = row
        if row[0, -1] == lm.ungenerated_token_id:
            padded[0, num_frames : num_frames + max(lm.delays)] = lm.ungenerated_token_id
    return codes.to(lm.device), bool((codes[:, 0] == lm.ungenerated_token_id).any())


def _logits_with_own_text(lm: LMModel, codes: Tensor, conditions: TextConditions) -> tuple[Tensor, Tensor]:
    """Logits by frame, `[B, K, S, card]`, and which rows' memory was given up as not finite, `[B]`.

    Args:
        codes: `[B, 1 + n_q, S]`; ungenerated text is the most likely token of the step before, as in
            `LMGen` without sampling.
    """
    initial = lm._get_initial_token().expand(len(codes), -1, -1)
    delayed = torch.cat([initial, _delay_sequence(lm.delays, codes, initial)], 2)  # [B, 1 + n_q, 1 + S]
    fused = fused_conditions(lm, conditions, batch_size=len(codes))
    hidden = []
    for step in range(codes.shape[2]):
        out, text_logits = lm.forward_text(delayed[:, :, step : step + 1], *fused)
        hidden.append(out)
        text = delayed[:, 0, step + 1]  # what this step predicts
        own = text_logits[:, 0, 0].argmax(-1)
        delayed[:, 0, step + 1] = torch.where(text == lm.ungenerated_token_id, own, text)
    # Moshi's depth transformer is detached from the streaming of the steps: here it sees whole frames.
    logits = lm.forward_depformer_training(delayed[:, :, 1:], torch.cat(hidden, 1))
    logits = _undelay_sequence(lm.delays[lm.audio_offset : lm.audio_offset + lm.dep_q], logits)[0]
    broken = torch.zeros(len(codes), dtype=torch.bool, device=logits.device)
    if ttt_layers(lm):
        for counts in non_finite_resets(lm).values():
            broken |= torch.tensor(counts, device=broken.device) > 0
    return logits, broken
