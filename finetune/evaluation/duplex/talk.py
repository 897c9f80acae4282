"""A model's answers to recordings of a user: its voice and its words with times."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.base_model.text import TextDecoder
from finetune.data.words import Word
from finetune.errors import ConfigError
from finetune.evaluation.duplex.speech import FRAME_SEC
from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import SpeechModel


class WordTimes:
    """The words of a text stream, from its tokens frame by frame.

    A word starts with the frame of its first token and ends with that of its last one, which is before its
    sound ends: the text stream does not say when that is.

    Args:
        decoder: of the text stream.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._words: list[Word] = []
        self._text = ""
        self._first = self._last = 0

    def add(self, token: int, frame: int) -> None:
        """Take the token of a frame, counted from 0."""
        self._take(self._decoder.add(token), frame)

    def finish(self) -> list[Word]:
        """The words of the whole stream, in seconds."""
        self._take(self._decoder.finish(), self._last)
        self._close()
        return self._words

    def _take(self, text: str, frame: int) -> None:
        for char in text:
            if char.isspace():
                self._close()
                continue
            if not self._text:
                self._first = frame
            self._text += char
            self._last = frame

    def _close(self) -> None:
        if self._text:
            word = Word(self._text, self._first * FRAME_SEC, (self._last + 1) * FRAME_SEC)
            self._words.append(word)
        self._text = ""


@dataclass(frozen=True)
class Answer:
    """What a model said to a recording.

    Attributes:
        audio: `[num_samples]` at the codec's rate; as long as the recording, in whole frames.
        words: of its text stream.
        memory_resets: how often fast weights were no longer finite.
    """

    audio: Tensor
    words: list[Word]
    memory_resets: int


class Talker:
    """A conversation that begins anew with each recording.

    Args:
        speech: the model.
        conversation: of it, which streams, with one row.
        seed: of the draws in each recording, whichever came before.
    """

    def __init__(self, speech: SpeechModel, conversation: Conversation, *, seed: int) -> None:
        self._speech = speech
        self._conversation = conversation
        self._seed = seed

    @torch.no_grad()
    def answer(self, user: Tensor) -> Answer:
        """Play a user's voice `[num_samples]` to the model, as generate.py does."""
        conversation = self._conversation
        conversation.start(seed=self._seed)
        size = conversation.mimi.frame_size
        words, audio = WordTimes(self._speech.text_decoder()), []
        for frame, samples in enumerate(user.split(size)):
            padded = torch.nn.functional.pad(samples, (0, size - len(samples)))
            reply = conversation.listen(padded[None])
            audio.append(reply.audio[0])
            if reply.tokens is not None:
                words.add(int(reply.tokens[0, 0]), frame)
        return Answer(torch.cat(audio), words.finish(), conversation.check_memory())


@contextmanager
def talking(speech: SpeechModel, *, sampling: Sampling, seed: int) -> Iterator[Talker]:
    """A model that talks, until the end of the context.

    Raises:
        ConfigError: it does not fit into memory.
    """
    conversation = Conversation(speech.lm, speech.mimi, sampling=sampling, conditions=speech.conditions)
    with ExitStack() as stack:
        try:
            stack.enter_context(conversation)
            conversation.warm_up()
        except (torch.OutOfMemoryError, MemoryError):
            raise ConfigError("--device: the model does not fit into its memory to talk.") from None
        yield Talker(speech, conversation, seed=seed)
