"""Speech to text: what a model that writes text only hears, word by word, with times.

Shapes: B batch rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from moshi.models.loaders import FRAME_RATE
from torch import Tensor

from finetune.base_model.locate import lm_config
from finetune.base_model.streams import silent_prefix_frames, text_delay_frames
from finetune.data.words import SPEAKERS, Word
from finetune.inference.conversation import Conversation, Reply
from finetune.inference.speech_model import SpeechModel

_LAST_FRAMES = 12  # of silence in which the last words are written, about 1 s, beside the delay


class WordStream:
    """Makes words with times of the tokens of a text stream, as they come.

    A word begins with a space, or after the end of padding; its time is that of its first token.

    Args:
        speech: the model that writes.
    """

    def __init__(self, speech: SpeechModel) -> None:
        config = lm_config(speech.info)
        self._shift = silent_prefix_frames(config) + text_delay_frames(config)
        self._text = speech.text_decoder()
        self._begins = speech.lm.end_of_text_padding_id
        self._padding = (self._begins, speech.lm.text_padding_token_id)
        self._word, self._start, self._end = "", 0, 0

    def add(self, token: int, frame: int) -> Word | None:
        """The word that a token ends, if it ends one.

        Args:
            token: of the text stream.
            frame: its place in the text stream.
        """
        piece = self._text.add(token)
        ended = None
        if token == self._begins or piece[:1].isspace():
            ended = self.finish()
        if token not in self._padding and (piece or self._word):
            if not self._word:
                self._start = frame
            self._word += piece
            self._end = frame + 1
        return ended

    def finish(self) -> Word | None:
        """The word that is not ended yet, if there is one."""
        text, self._word = self._word.strip(), ""
        if not text:
            return None
        start, end = (max(0, frame - self._shift) / FRAME_RATE for frame in (self._start, self._end))
        return Word(text, start, end, SPEAKERS[0])


@dataclass(frozen=True)
class Transcriber:
    """Lets a model hear a recording and write it down.

    Attributes:
        speech: the model.
        conversation: of the model, started.
    """

    speech: SpeechModel
    conversation: Conversation

    def frames(self, audio: Tensor) -> list[Tensor]:
        """A recording `[num_samples]` in frames, between the silences that the model expects."""
        size, config = self.conversation.mimi.frame_size, lm_config(self.speech.info)
        before = silent_prefix_frames(config) * size
        after = (text_delay_frames(config) + _LAST_FRAMES) * size + -len(audio) % size
        return list(torch.nn.functional.pad(audio, (before, after)).split(size))

    def write(
        self,
        audio: Tensor,
        *,
        on_word: Callable[[Word], None] | None = None,
        hear: Callable[[Tensor], Reply] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[list[Word]]:
        """The words of a recording, of each row.

        Args:
            audio: `[num_samples]`.
            on_word: called with each word of the first row, as it is complete.
            hear: what hears a frame `[1, frame_size]` instead of `Conversation.listen`.
            stopped: asked after each frame whether to end there.
        """
        hear = hear or self.conversation.listen
        streams = [WordStream(self.speech) for _ in range(self.conversation.batch_size)]
        rows: list[list[Word]] = [[] for _ in streams]

        def note(row: int, word: Word | None) -> None:
            if word is None:
                return
            rows[row].append(word)
            if on_word is not None and row == 0:
                on_word(word)

        for frame, tokens in self._tokens(audio, hear, stopped):
            for row, stream in enumerate(streams):
                note(row, stream.add(tokens[row], frame))
        for row, stream in enumerate(streams):
            note(row, stream.finish())
        return rows

    def _tokens(
        self, audio: Tensor, hear: Callable[[Tensor], Reply], stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, list[int]]]:
        """Frames of the text stream and the tokens there, of all rows."""
        # What a frame brings is the text of the next one, less what the longest delay holds back.
        first = 1 - max(self.conversation.lm.delays)
        for index, frame in enumerate(self.frames(audio)):
            reply = hear(frame[None])
            if reply.tokens is not None:
                yield index + first, reply.tokens[:, 0].tolist()
            if stopped():
                return
