"""The model of the server, in a thread of its own, one conversation at a time."""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from moshi.models.loaders import FRAME_RATE

from finetune.errors import StateError
from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import SpeechModel
from moshi_ttt.hybrid_model import streaming_states, ttt_layers
from moshi_ttt.memory import load_ttt_states, save_ttt_states

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SpokenFrame:
    """What the model says in one frame.

    Attributes:
        audio: float32 `[frame_size]`; None of a model that writes text only.
        text: what is added to the transcript.
        activity: size of the gated TTT update relative to the residual stream, by layer.
        frame_ms: how long it took.
        num_resets: of fast weights that were no longer finite, in this conversation.
    """

    audio: np.ndarray | None
    text: str
    activity: dict[int, float]
    frame_ms: float
    num_resets: int


@dataclass(frozen=True)
class MemoryFiles:
    """Where memories of conversations come from and go to.

    Attributes:
        load: read at the start of every conversation; where it is also the file to save, it may be missing.
        save: written at the end of every conversation.
    """

    load: Path | None = None
    save: Path | None = None


class Voice:
    """A speech model whose methods run in one thread, so that the server stays awake meanwhile.

    Args:
        speech: the model.
        sampling: how tokens are drawn.
        files: memories.
        seed: of the draws.
    """

    def __init__(
        self, speech: SpeechModel, *, sampling: Sampling | None = None, files: MemoryFiles, seed: int = 0
    ) -> None:
        self.frame_size = int(speech.mimi.frame_size)
        self.sample_rate = int(speech.mimi.sample_rate)
        self._speech = speech
        self._files = files
        self._seed = seed
        self._conversation = Conversation(
            speech.lm, speech.mimi, sampling=sampling, conditions=speech.conditions
        )
        self._text = speech.text_decoder()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="voice")
        self._streaming = ExitStack()
        self._recent_ms: deque[float] = deque(maxlen=250)

    @property
    def median_frame_ms(self) -> float | None:
        """Of the last 20 s of speech."""
        return float(np.median(self._recent_ms)) if self._recent_ms else None

    async def open(self) -> None:
        """Allocate the streaming state and warm up; once.

        Raises:
            StateError: the memory file does not fit the model.
        """
        await self._run(self._open)

    async def begin(self, *, fresh: bool = False) -> None:
        """Start a conversation.

        Args:
            fresh: without the memory file.

        Raises:
            StateError: the memory file can no longer be read.
        """
        await self._run(lambda: self._begin(fresh))

    async def answer(self, frame: np.ndarray) -> SpokenFrame:
        """Hear a frame, float32 `[frame_size]`, and answer it."""
        return await self._run(lambda: self._answer(frame))

    async def end(self) -> None:
        """Save the memory of the conversation, where that is asked for; an error is logged."""
        await self._run(self._end)

    async def close(self) -> None:
        """Give the streaming state back and end the thread."""
        await self._run(self._streaming.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _open(self) -> None:
        self._streaming.enter_context(self._conversation)
        torch.manual_seed(self._seed)
        self._conversation.warm_up()
        self._begin(False)

    def _begin(self, fresh: bool) -> None:
        self._conversation.start()
        self._text = self._speech.text_decoder()
        load, save = self._files.load, self._files.save
        if load is None or fresh:
            return
        is_same = save is not None and os.path.realpath(load) == os.path.realpath(save)
        if is_same and not load.exists():
            return
        load_ttt_states(self._conversation.lm, load)

    def _answer(self, frame: np.ndarray) -> SpokenFrame:
        start = time.perf_counter()
        reply = self._conversation.listen(torch.from_numpy(frame)[None])
        text = "" if reply.tokens is None else self._text.add(int(reply.tokens[0, 0]))
        lm = self._conversation.lm
        states = streaming_states(lm) if ttt_layers(lm) else {}
        activity = {index: state.activity[0].item() for index, state in states.items()}
        frame_ms = (time.perf_counter() - start) * 1000
        self._recent_ms.append(frame_ms)
        audio = reply.audio[0].numpy() if self._conversation.speaks else None
        return SpokenFrame(audio, text, activity, frame_ms, self._conversation.num_resets)

    def _end(self) -> None:
        self._conversation.check_memory()
        if self._files.save is None or not self._conversation.num_frames:
            return
        try:
            save_ttt_states(self._conversation.lm, self._files.save)
            seconds = self._conversation.num_frames / FRAME_RATE
            logger.info("memory of %.1f s saved as %s", seconds, self._files.save)
        except StateError as error:
            logger.error("the memory of this conversation is lost: %s", error)
