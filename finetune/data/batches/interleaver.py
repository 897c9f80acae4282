"""The text stream: word tokens placed on the frames in which they are spoken."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data.args import TextOptions
from finetune.data.batches.spelling import Spelling, Tokenizer, fitting, is_spaced, spell
from finetune.data.words import SPEAKERS, Word

_CUT = TextOptions()


@dataclass(frozen=True)
class TextCount:
    """How much of a text reaches the text stream.

    Attributes:
        words: that become text.
        tokens: of these.
        placed: tokens that have a frame.
        late_frames: by how many frames a word starts late, at most.
    """

    words: int = 0
    tokens: int = 0
    placed: int = 0
    late_frames: int = 0

    def __add__(self, other: "TextCount") -> "TextCount":
        """Both together."""
        return TextCount(
            self.words + other.words,
            self.tokens + other.tokens,
            self.placed + other.placed,
            max(self.late_frames, other.late_frames),
        )


def interleave_text(
    words: Iterable[Word],
    *,
    num_frames: int,
    frame_rate: float,
    tokenizer: Tokenizer,
    text_padding_id: int,
    end_of_text_padding_id: int,
    options: TextOptions = _CUT,
) -> Tensor:
    """Build the text tokens of a recording, or a part of one, a token per frame, as moshi-finetune does.

    A word's tokens start at frame `floor(start_sec * frame_rate)` and take one frame each; those of words
    that start in one frame follow each other. The next word replaces what is left of them, or with
    `keep_and_shift` waits for it; a character is never cut. When the frame before a word is padding, it
    becomes end-of-padding. All other frames are padding.

    Args:
        words: words with times in seconds from its start, of which only the start counts. Left out: words
            that start before it, and with `keep_main_only` other speakers than Moshi.
        num_frames: frames T.
        frame_rate: frames per second.
        tokenizer: text tokenizer of the model. What is unknown to it is left out.
        text_padding_id: token of frames without text.
        end_of_text_padding_id: token of the last padding frame before a word.
        options: which words, and what becomes of those that do not fit.

    Returns:
        int64 tokens, `[T]`.
    """
    text = [text_padding_id] * num_frames
    for first, tokens, _ in _place(words, num_frames, frame_rate, tokenizer, options):
        if tokens and first > 0 and text[first - 1] == text_padding_id:
            text[first - 1] = end_of_text_padding_id
        text[first : first + len(tokens)] = tokens
    return torch.tensor(text, dtype=torch.long)


def count_text(
    words: Iterable[Word],
    *,
    num_frames: int,
    frame_rate: float,
    tokenizer: Tokenizer,
    options: TextOptions = _CUT,
) -> TextCount:
    """Count what `interleave_text` places, see there."""
    words = text_words(words, options)
    placed = late = 0
    for _, tokens, late_frames in _place(words, num_frames, frame_rate, tokenizer, options):
        placed += len(tokens)
        late = max(late, late_frames if tokens else 0)
    wanted = sum(spelling.num_tokens for spelling in _spell_all(words, tokenizer))
    return TextCount(len(words), wanted, placed, late)


def text_words(words: Iterable[Word], options: TextOptions) -> list[Word]:
    """Those that become text, in the order of their starts."""
    kept = (word for word in words if word.speaker == SPEAKERS[0] or not options.keep_main_only)
    return sorted((word for word in kept if word.start_sec >= 0), key=lambda word: word.start_sec)


def _place(
    words: Iterable[Word], num_frames: int, frame_rate: float, tokenizer: Tokenizer, options: TextOptions
) -> Iterable[tuple[int, list[int], int]]:
    """The first frame and the tokens of words, all that start in one frame together, and how late that is."""
    units: dict[int, list[tuple[int, ...]]] = {}
    words = text_words(words, options)
    for word, spelling in zip(words, _spell_all(words, tokenizer), strict=True):
        # 4.56 s at 12.5 frames a second are frame 57, and a little less in floating point.
        first = int(round(word.start_sec * frame_rate, 6))
        units.setdefault(first, []).extend(spelling.units)
    free = 0
    starts = list(units)
    for first, following in zip(starts, [*starts[1:], num_frames], strict=False):
        start, end = first, min(following, num_frames)
        if options.keep_and_shift:
            start, end = max(first, free), num_frames
        tokens = fitting(units[first], end - start)
        free = start + len(tokens)
        yield start, tokens, start - first


def _spell_all(words: Sequence[Word], tokenizer: Tokenizer) -> Iterable[Spelling]:
    """Spell words that follow each other, with the spaces between them that their writing has."""
    before = ""
    for word in words:
        yield spell(tokenizer, word.text, spaced=is_spaced(before, word.text))
        before = word.text.strip() or before
