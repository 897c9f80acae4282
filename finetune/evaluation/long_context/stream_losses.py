"""Losses of every frame of one recording, in a single causal pass whose memory does not grow.

A step predicts before it hears: the input of step s is the delayed codes of step s - 1 (the start token in
step 0), as in `LMModel.forward`. Codebook k with delay d predicts frame f in step f + d, so a recording of
N frames takes N + max(delays) steps and loses no target.

Shapes: T steps of a chunk, N frames of the recording, K codebooks that Moshi predicts (dep_q), n_q audio
codebooks in all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention
from moshi.utils.compile import CUDAGraphed
from torch import Tensor

from finetune.base_model.conditions import FusedConditions, TextConditions, fused_conditions
from moshi_ttt.attention import ChunkedAttention
from moshi_ttt.hybrid_model import non_finite_resets, ttt_layers


class CodeStream(Protocol):
    """A recording as codes."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def num_frames(self) -> int:
        """N."""
        ...

    def frames(self, start: int, stop: int) -> Tensor:
        """Codes of frames `start` to `stop`, `[1 + n_q, stop - start]` int64, text first; -1: no token."""
        ...


class StreamLosses(NamedTuple):
    """Cross-entropy of each target of a recording in nats, float32, on the CPU.

    NaN where there is no target, infinite where the model's loss is not finite.
    """

    text: Tensor  # [N]
    audio: Tensor  # [K, N]
    memory_resets: int  # how often fast weights were no longer finite and went back to W0

    def metrics(self) -> dict[str, Tensor]:
        """`[N]` each: text, semantic (codebook 0), acoustic (mean of the others), audio (mean of all K)."""
        return {
            "text": self.text,
            "semantic": self.audio[0],
            "acoustic": self.audio[1:].nanmean(0),
            "audio": self.audio.nanmean(0),
        }

    def first_failure(self) -> int | None:
        """The first frame with a loss that is not finite, None where all are."""
        failed = (self.text.isinf() | self.audio.isinf().any(0)).nonzero()
        return int(failed[0]) if len(failed) else None


@torch.no_grad()
def stream_losses(
    lm: LMModel,
    stream: CodeStream,
    *,
    chunk_frames: int,
    own_text: bool = False,
    conditions: TextConditions | None = None,
    on_steps: Callable[[int], None] | None = None,
) -> StreamLosses:
    """Stream a recording through a model and keep the loss of each of its targets.

    Args:
        lm: in evaluation mode, not streaming.
        stream: the recording, of at least one frame.
        chunk_frames: steps per forward pass; changes time and memory, not the losses.
        own_text: feed the model the text that it finds most likely itself, step by step, in place of the
            stream's; there is no text loss then.
        conditions: texts that a model with conditions is told.
        on_steps: called after each chunk with its number of steps.

    Raises:
        DataError: the stream cannot be read.
    """
    assert not lm.training and lm.depformer is not None and stream.num_frames > 0
    stream_chunks_exactly(lm)
    text = torch.full((1, stream.num_frames), math.nan)
    audio = torch.full((lm.dep_q, stream.num_frames), math.nan)
    num_steps = stream.num_frames + max(lm.delays)
    fused = fused_conditions(lm, conditions or {}, batch_size=1)
    own = _OwnText(lm, fused) if own_text else None
    with lm.streaming(1):
        for start in range(0, num_steps, chunk_frames):
            stop = min(start + chunk_frames, num_steps)
            # One more in front: the inputs are the targets of the steps before.
            codes = delayed_codes(lm, stream, start - 1, stop)[None].to(lm.device)
            text_losses, audio_losses = _chunk_losses(lm, codes, fused, own)
            if own is None:
                _scatter(text, text_losses.cpu(), lm.delays[:1], start)
            _scatter(audio, audio_losses.cpu(), lm.delays[1 : 1 + lm.dep_q], start)
            if on_steps is not None:
                on_steps(stop - start)
        resets = non_finite_resets(lm) if ttt_layers(lm) else {}
    return StreamLosses(text[0], audio, sum(map(sum, resets.values())))


def stream_chunks_exactly(lm: LMModel) -> None:
    """Let a model without TTT layers stream chunks longer than one frame, as patched models do, in place."""
    for layer in lm.transformer.layers:
        if type(layer.self_attn) is StreamingMultiheadAttention:
            ChunkedAttention.from_attention(layer.self_attn)


def delayed_codes(lm: LMModel, stream: CodeStream, start: int, stop: int) -> Tensor:
    """What steps `start` (-1 or later) to `stop` predict, `[1 + n_q, stop - start]` on the CPU.

    Start tokens before a codebook's first frame, zero tokens after its last: nothing is known there.
    """
    num_frames = stream.num_frames
    first, last = max(start - max(lm.delays), 0), min(stop, num_frames)
    read = stream.frames(first, last) if first < last else None
    initial = lm._get_initial_token()[0].cpu()  # [1 + n_q, 1]
    index = torch.arange(start, stop) - torch.tensor(lm.delays)[:, None]  # [1 + n_q, T], frames
    codes = torch.full_like(index, lm.zero_token_id)
    if read is not None:
        inside = (index >= 0) & (index < num_frames)
        places = (index - first).clamp(0, last - first - 1)
        codes = torch.where(inside, read.cpu().long().gather(1, places), codes)
    return torch.where(index < 0, initial, codes)


class _OwnText:
    """The text stream that a model writes for itself, greedily."""

    def __init__(self, lm: LMModel, fused: FusedConditions) -> None:
        self._fused = fused
        self._delay = lm.delays[0]
        self._forward = CUDAGraphed(lm.forward_text, disable=lm.device.type != "cuda")
        self._num_steps = 0
        self._token: Tensor | None = None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states `[1, T, dim]` and the text tokens that follow each step, `[1, T]`.

        Args:
            inputs: `[1, 1 + n_q, T]`; their text row is replaced.
        """
        hidden, tokens = [], []
        for step in inputs.split(1, 2):
            if self._num_steps > self._delay:
                assert self._token is not None
                step = torch.cat([self._token[:, None], step[:, 1:]], 1)
            out, logits = self._forward(step, *self._fused)
            self._token = logits[:, 0].argmax(-1)  # [1, 1]
            self._num_steps += 1
            hidden.append(out.clone())  # a CUDA graph writes the next one to the same place
            tokens.append(self._token)
        return torch.cat(hidden, 1), torch.cat(tokens, 1)


def _chunk_losses(
    lm: LMModel, codes: Tensor, fused: FusedConditions, own: _OwnText | None
) -> tuple[Tensor, Tensor]:
    """Losses by step, text `[1, T]` and audio `[K, T]`, of delayed codes `[1, 1 + n_q, 1 + T]`."""
    inputs, targets = codes[:, :, :-1], codes[:, :, 1:]
    if own is None:
        hidden, text_logits = lm.forward_text(inputs, *fused)
        text_losses = _token_losses(text_logits[0], targets[0, :1], lm.zero_token_id)
    else:
        hidden, tokens = own.forward(inputs)
        targets = torch.cat([tokens[:, None], targets[:, 1:]], 1)
        text_losses = hidden.new_empty(0)
    # Moshi's depth transformer is detached from the streaming of the steps: here it sees whole frames.
    logits = lm.forward_depformer_training(targets, hidden)
    return text_losses, _token_losses(logits[0], targets[0, 1 : 1 + lm.dep_q], lm.zero_token_id)


def _token_losses(logits: Tensor, targets: Tensor, zero_token: int) -> Tensor:
    """`[K, T, card]` and `[K, T]` to losses `[K, T]`: NaN at zero tokens, infinite where not finite."""
    # Start tokens are beyond the last logit; `_scatter` leaves them out.
    inside = targets.clamp(0, logits.shape[-1] - 1)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), inside.flatten(), reduction="none")
    losses = losses.nan_to_num(math.inf, math.inf, math.inf).view_as(targets)
    return losses.masked_fill(targets == zero_token, math.nan)


def _scatter(losses: Tensor, steps: Tensor, delays: list[int], start: int) -> None:
    """Put losses by step `[K, T]`, from step `start` on, to their frames in `[K, N]`."""
    for row, new, delay in zip(losses, steps, delays, strict=True):
        first = start - delay
        left, right = max(first, 0), min(first + len(new), len(row))
        if left < right:
            row[left:right] = new[left - first : right - first]
