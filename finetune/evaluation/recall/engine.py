"""Likelihoods of the answers of items, in streams whose memory does not grow with the lag.

The conversations of a batch are streamed together. Where an answer is due the state of the stream is copied,
every answer is tried from there, and the stream goes on to the next lag as if nothing had been asked.

A step predicts before it hears, as in `finetune.evaluation.long_context.stream_losses`.

Shapes: R rows (conversations of all items of the batch), K answers of an item, Q streams of tokens, T steps.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.base_model.conditions import FusedConditions, TextConditions, fused_conditions
from finetune.evaluation.long_context.stream_losses import delayed_codes, stream_chunks_exactly
from finetune.evaluation.recall.conversations import CodedGroup, Conversation
from moshi_ttt.memory import load_ttt_states, save_ttt_states
from moshi_ttt.session import copy_stream, restore_stream


class AnswerScores(NamedTuple):
    """Log-likelihoods in nats, float64 `[K, K]`: of answer j in conversation i, sums over its frames.

    Attributes:
        text: of Moshi's words.
        semantic: of its first codebook.
        audio: of all its codebooks.
    """

    text: Tensor
    semantic: Tensor
    audio: Tensor


@torch.no_grad()
def score_groups(
    lm: LMModel,
    groups: Sequence[CodedGroup],
    *,
    lags: Sequence[int],
    cue_frames: int,
    chunk_frames: int,
    sessions: bool = False,
    conditions: TextConditions | None = None,
    on_steps: Callable[[int], None] | None = None,
) -> list[dict[int, AnswerScores]]:
    """Score all answers of items at all lags.

    Args:
        lm: in evaluation mode, not streaming.
        groups: items with plants of one length.
        lags: frames from the end of the plant to the start of the answer, none shorter than `cue_frames`.
        cue_frames: of the longest cue of all items.
        chunk_frames: steps per forward pass; changes time and memory, not the scores.
        sessions: the plant is heard in a session of its own, whose memory is saved to a file and loaded into
            a new one in which the rest follows; the lag begins with it.
        conditions: texts that a model with conditions is told.
        on_steps: called with numbers of steps that are done.

    Returns:
        The scores of each item by lag.

    Raises:
        DataError: a recording cannot be read.
    """
    assert not lm.training and lm.depformer is not None and min(lags) >= cue_frames
    stream_chunks_exactly(lm)
    return _Pass(lm, groups, sorted(lags), cue_frames, chunk_frames, sessions, conditions, on_steps).run()


def num_steps(plant_frames: int, lags: Sequence[int], cue_frames: int) -> int:
    """How many steps `score_groups` reports of a batch."""
    return plant_frames + max(lags) - cue_frames + cue_frames * len(lags)


class _Pass:
    """One batch."""

    def __init__(
        self,
        lm: LMModel,
        groups: Sequence[CodedGroup],
        lags: Sequence[int],
        cue_frames: int,
        chunk_frames: int,
        sessions: bool,
        conditions: TextConditions | None,
        on_steps: Callable[[int], None] | None,
    ) -> None:
        self.lm, self.groups, self.lags = lm, groups, lags
        self.cue_frames, self.chunk_frames, self.sessions = cue_frames, chunk_frames, sessions
        self.rows = [(group, plant) for group in groups for plant in range(len(group.plants))]
        self.fused: FusedConditions = fused_conditions(lm, conditions or {}, batch_size=len(self.rows))
        self.on_steps = on_steps or (lambda steps: None)

    def run(self) -> list[dict[int, AnswerScores]]:
        found: list[dict[int, AnswerScores]] = [{} for _ in self.groups]
        with tempfile.TemporaryDirectory(prefix="moshi-ttt-recall-") as folder:
            memory = Path(folder) / "memory.safetensors"
            if self.sessions:
                self._plant(memory)
            with self.lm.streaming(len(self.rows)):
                if self.sessions:
                    load_ttt_states(self.lm, memory)
                step = 0
                for lag in self.lags:
                    streams = self._streams(lag)
                    asked = streams[0].answer_start - self.cue_frames
                    self._hear(self._streams(self.lags[-1]), step, asked)
                    step = asked
                    before = copy_stream(self.lm)
                    self._hear(streams, asked, asked + self.cue_frames)
                    for scores, new in zip(found, self._answers(lag), strict=True):
                        scores[lag] = new
                    restore_stream(self.lm, before)
        return found

    def _streams(self, lag: int, answer: int = 0) -> list[Conversation]:
        return [
            group.conversation(
                None if self.sessions else plant, lag=lag, answer=min(answer, len(group.answers) - 1)
            )
            for group, plant in self.rows
        ]

    def _plant(self, memory: Path) -> None:
        """The session in which the plant is said, to its end, and its memory as a file."""
        plants = [
            Conversation(
                group.group.name, group.plants[plant], group.filler, group.cue[:, :0], group.cue[:, :0], 0
            )
            for group, plant in self.rows
        ]
        with self.lm.streaming(len(self.rows)):
            self._hear(plants, 0, plants[0].num_frames + 1 + max(self.lm.delays))
            save_ttt_states(self.lm, memory)

    def _hear(self, streams: Sequence[Conversation], start: int, stop: int) -> None:
        """Steps `start` to `stop`, whose predictions nobody asks for."""
        for first in range(start, stop, self.chunk_frames):
            last = min(first + self.chunk_frames, stop)
            codes = self._delayed(streams, first, last)
            self.lm.forward_text(codes[:, :, :-1], *self.fused)
            self.on_steps(last - first)

    def _delayed(self, streams: Sequence[Conversation], start: int, stop: int) -> Tensor:
        """What steps `start` to `stop` predict, `[R, 1 + n_q, 1 + T]`, with one more in front."""
        codes = [delayed_codes(self.lm, stream, start - 1, stop) for stream in streams]
        return torch.stack(codes).to(self.lm.device)

    def _answers(self, lag: int) -> list[AnswerScores]:
        """Every answer, from the state in which the stream is and which it is left in."""
        before = copy_stream(self.lm)
        most = max(len(group.answers) for group in self.groups)
        by_answer = []
        for number in range(most):
            streams = self._streams(lag, number)
            by_answer.append(self._answer(streams))
            restore_stream(self.lm, before)
        scores = torch.stack(by_answer, 1)  # [R, most, 3]
        parts = scores.split([len(group.plants) for group in self.groups])
        return [
            AnswerScores(*part[:, : len(group.answers)].unbind(2))
            for group, part in zip(self.groups, parts, strict=True)
        ]

    def _answer(self, streams: Sequence[Conversation]) -> Tensor:
        """Log-likelihoods of one answer per row, `[R, 3]` float64 on the CPU: text, semantic, audio."""
        lm, start = self.lm, streams[0].answer_start
        lengths = torch.tensor([stream.answer.shape[1] for stream in streams])
        codes = self._delayed(streams, start, start + int(lengths.max()) + max(lm.delays))
        inputs, targets = codes[:, :, :-1], codes[:, :, 1:]
        hidden, text_logits = lm.forward_text(inputs, *self.fused)
        # Moshi's depth transformer is detached from the streaming of the steps: here it sees whole frames.
        logits = lm.forward_depformer_training(targets, hidden)
        text = self._sums(text_logits, targets[:, :1], lengths, lm.delays[:1])
        audio = self._sums(logits, targets[:, 1 : 1 + lm.dep_q], lengths, lm.delays[1 : 1 + lm.dep_q])
        return torch.stack([text[:, 0], audio[:, 0], audio.sum(1)], 1)

    def _sums(self, logits: Tensor, targets: Tensor, lengths: Tensor, delays: Sequence[int]) -> Tensor:
        """Log-likelihoods of the targets `[R, Q, T]` within the answers, `[R, Q]` float64 on the CPU."""
        inside = targets.clamp(0, logits.shape[-1] - 1)
        values = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        values = values.gather(-1, inside[..., None])[..., 0].double().cpu()
        frame = torch.arange(targets.shape[2]) - torch.tensor(delays)[:, None]  # [Q, T], of the answer
        counted = (frame >= 0) & (frame < lengths[:, None, None])
        counted &= (targets != self.lm.zero_token_id).cpu()
        return values.masked_fill(~counted, 0).sum(2)
