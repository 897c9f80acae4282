"""One conversation, or a batch of them in step: a frame of the user in, a frame of the model out.

Shapes: B batch rows, K codebooks.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from moshi.models import MimiModel
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from finetune.base_model.conditions import TextConditions, condition_tensors
from finetune.base_model.streams import model_streams
from moshi_ttt.hybrid_model import non_finite_resets, ttt_layers

logger = logging.getLogger(__name__)

_WARM_UP_FRAMES = 4  # CUDA graphs are captured in the second
_FRAMES_BETWEEN_CHECKS = 25  # 2 s


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are Moshi's.

    Attributes:
        greedy: take the most likely token instead.
        temp, temp_text: temperatures of audio and text.
        top_k, top_k_text: how many of the most likely tokens are drawn from.
    """

    greedy: bool = False
    temp: float = 0.8
    temp_text: float = 0.7
    top_k: int = 250
    top_k_text: int = 25


@dataclass(frozen=True)
class Reply:
    """What the model says in one frame of 80 ms, on the CPU.

    Attributes:
        tokens: text and audio, `[B, 1 + K]`; None in the first frames of a model whose delays are longer
            than one frame.
        audio: `[B, frame_size]`, silence without tokens.
    """

    tokens: Tensor | None
    audio: Tensor


class Conversation:
    """A model that listens and speaks, frame by frame; a context manager.

    The user's frame t and the model's frame t are those of training: Moshi's generator replaces what it
    hears in its very first step by the start token, so that step is made before the first frame arrives.

    Args:
        lm: in evaluation mode, not streaming.
        mimi: the codec, not streaming.
        sampling: how tokens are drawn.
        batch_size: conversations side by side.
        conditions: texts that the model is conditioned on; those that are missing are unknown to it.
    """

    def __init__(
        self,
        lm: LMModel,
        mimi: MimiModel,
        *,
        sampling: Sampling | None = None,
        batch_size: int = 1,
        conditions: TextConditions | None = None,
    ) -> None:
        sampling = sampling or Sampling()
        self.lm = lm
        self.mimi = mimi
        self.batch_size = batch_size
        self.generator = LMGen(
            lm,
            use_sampling=not sampling.greedy,
            temp=sampling.temp,
            temp_text=sampling.temp_text,
            top_k=sampling.top_k,
            top_k_text=sampling.top_k_text,
            condition_tensors=condition_tensors(lm, conditions or {}, batch_size=batch_size),
        )
        self.speaks = model_streams(lm).speaks
        self.num_frames = 0
        self.num_resets = 0
        self._streaming = ExitStack()

    def __enter__(self) -> "Conversation":
        self._streaming.enter_context(self.mimi.streaming(self.batch_size))
        self._streaming.enter_context(self.generator.streaming(self.batch_size))
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._streaming.close()

    @torch.no_grad()
    def start(self, *, seed: int | None = None) -> None:
        """Begin a new conversation: everything is forgotten.

        Args:
            seed: of the draws of this process; None leaves the generators as they are.
        """
        self.mimi.reset_streaming()
        self.generator.reset_streaming()
        self.num_frames = self.num_resets = 0
        if seed is not None:
            torch.manual_seed(seed)
        num_codebooks = self.lm.num_codebooks - self.lm.dep_q - 1
        unheard = torch.zeros((self.batch_size, num_codebooks, 1), dtype=torch.long, device=self.lm.device)
        self.generator.step(unheard)

    def warm_up(self) -> None:
        """Make a few frames and forget them, so that the first real one is as fast as the others."""
        silence = torch.zeros(1, self.mimi.frame_size)
        for _ in range(_WARM_UP_FRAMES):
            self.listen(silence)
        self.start()

    @torch.no_grad()
    def listen(self, audio: Tensor) -> Reply:
        """Hear a frame of the user and answer it.

        Args:
            audio: `[B, frame_size]` at the codec's rate, or `[1, frame_size]` for all rows.
        """
        audio = audio.to(self.lm.device, torch.float32).expand(self.batch_size, -1)
        codes = self.mimi.encode(audio[:, None])
        tokens = self.generator.step(codes)
        self.num_frames += 1
        if self.num_frames % _FRAMES_BETWEEN_CHECKS == 0:
            self.check_memory()
        if tokens is None:
            return Reply(None, torch.zeros(self.batch_size, self.mimi.frame_size))
        if not self.speaks:
            return Reply(tokens[:, :, 0].cpu(), torch.zeros(self.batch_size, self.mimi.frame_size))
        heard = self.mimi.decode(tokens[:, 1:])[:, 0]
        return Reply(tokens[:, :, 0].cpu(), heard.float().cpu())

    def check_memory(self) -> int:
        """How often a row's memory was reset because it was no longer finite; news are logged."""
        if not ttt_layers(self.lm):
            return 0
        resets = non_finite_resets(self.lm)
        total = sum(map(sum, resets.values()))
        if total > self.num_resets:
            where = ", ".join(
                f"layer {index} row {row} ({count})"
                for index, counts in resets.items()
                for row, count in enumerate(counts)
                if count
            )
            logger.warning(
                "Fast weights were no longer finite and went back to W0: %s. Training with a smaller "
                "ttt.base_lr or with ttt.state_decay prevents it.",
                where,
            )
        self.num_resets = total
        return total
