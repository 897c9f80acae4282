"""The text stream: word tokens placed on the frames in which they are spoken."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from finetune.data.words import SPEAKERS, Word


class Tokenizer(Protocol):
    """The part of `sentencepiece.SentencePieceProcessor` that is used here."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without begin or end tokens."""
        ...


def interleave_text(
    words: Iterable[Word],
    *,
    num_frames: int,
    frame_rate: float,
    tokenizer: Tokenizer,
    text_padding_id: int,
    end_of_text_padding_id: int,
) -> Tensor:
    """Build the text tokens of a recording, or a part of one, a token per frame, as moshi-finetune does.

    A word's tokens start at frame `floor(start_sec * frame_rate)` and take one frame each; the next word
    replaces what is left of them. When the frame before a word is padding, it becomes end-of-padding. All
    other frames are padding.

    Args:
        words: words with times in seconds from its start. Left out: other speakers than Moshi, words
            that do not end after they start, words that start before it.
        num_frames: frames T.
        frame_rate: frames per second.
        tokenizer: text tokenizer of the model.
        text_padding_id: token of frames without text.
        end_of_text_padding_id: token of the last padding frame before a word.

    Returns:
        int64 tokens, `[T]`.
    """
    kept = sorted(
        (w for w in words if w.speaker == SPEAKERS[0] and 0 <= w.start_sec < w.end_sec),
        key=lambda w: w.start_sec,
    )
    # 4.56 s at 12.5 frames a second are frame 57, and a little less in floating point.
    first_frames = [int(round(w.start_sec * frame_rate, 6)) for w in kept] + [num_frames]
    text = [text_padding_id] * num_frames
    for word, first, following in zip(kept, first_frames[:-1], first_frames[1:], strict=True):
        last = min(following, num_frames)
        # Of several words that start in one frame only the last is said: most need no tokens.
        tokens = _encode_word(tokenizer, word.text)[: last - first] if last > first else []
        if tokens:
            if first > 0 and text[first - 1] == text_padding_id:
                text[first - 1] = end_of_text_padding_id
            text[first : first + len(tokens)] = tokens
    return torch.tensor(text, dtype=torch.long)


def _encode_word(tokenizer: Tokenizer, text: str) -> list[int]:
    # A line break within a text would become a space, although many vocabularies have a token for it.
    first, *others = text.strip().split("\n")
    tokens = list(tokenizer.encode(first))
    for line in others:
        tokens += [*tokenizer.encode("\n")[-1:], *tokenizer.encode(line)]
    return tokens
