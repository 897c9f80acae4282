"""Words as text tokens, in groups that stand for whole characters."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

_SPACE = "▁"  # how sentencepiece writes a space, also the one that it puts before every text
_GUARD = "\ue000"  # for private use: no piece of a vocabulary spans it and what follows
_JOINER = "\u200d"
# Writing without spaces between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer; and their punctuation.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff01-\uff9f\uffe0-\uffe6\U00020000-\U0003ffff]"
)


class Tokenizer(Protocol):
    """The part of `sentencepiece.SentencePieceProcessor` that is used here."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without begin or end tokens."""
        ...

    def id_to_piece(self, token: int) -> str:
        """What a token stands for."""
        ...

    def is_byte(self, token: int) -> bool:
        """Whether it stands for a byte of a character that has no token, as `<0xE4>`."""
        ...

    def is_unknown(self, token: int) -> bool:
        """Whether it stands for all characters that have no token."""
        ...

    def __hash__(self) -> int: ...


class Spelling(NamedTuple):
    """A word in tokens.

    Attributes:
        units: tokens that belong together: all bytes of a character, and its accents.
        num_unknown: tokens that stand for nothing known, which are not among them.
    """

    units: tuple[tuple[int, ...], ...]
    num_unknown: int

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return sum(map(len, self.units)) + self.num_unknown


def is_spaced(before: str, text: str) -> bool:
    """Whether a word is written with a space before it, given the word before, which may be empty.

    Beside Chinese, Japanese, Thai and what else is written without spaces, words of other languages have none
    either: `私はPythonを使う`.
    """
    return not (_WITHOUT_SPACES.search(before) or _WITHOUT_SPACES.search(text))


@lru_cache(maxsize=1 << 16)
def spell(tokenizer: Tokenizer, text: str, *, spaced: bool = True) -> Spelling:
    """Spell a word.

    Args:
        tokenizer: of the model, whether or not it puts a space before every text by itself.
        text: the word; line breaks within it stay, space around it does not.
        spaced: whether a space stands before it.
    """
    # A line break within a text would become a space, although many vocabularies have a token for it.
    first, *others = text.strip().split("\n")
    tokens = _encode(tokenizer, first, spaced=spaced)
    for line in others:
        line_break = tokenizer.encode("\n")[-1:]
        tokens += [*line_break, *_encode(tokenizer, line, spaced=not line_break and is_spaced(first, line))]
    known = [token for token in tokens if not tokenizer.is_unknown(token)]
    return Spelling(tuple(map(tuple, _units(tokenizer, known))), len(tokens) - len(known))


def fitting(units: Iterable[Sequence[int]], room: int) -> list[int]:
    """The tokens of the first units that fit together into `room` frames."""
    tokens: list[int] = []
    for unit in units:
        if len(tokens) + len(unit) > room:
            break
        tokens += unit
    return tokens


def _encode(tokenizer: Tokenizer, text: str, *, spaced: bool) -> list[int]:
    tokens = list(tokenizer.encode(text))
    if not tokens or _begins_with_space(tokenizer, tokens) == spaced:
        return tokens
    if tokenizer.id_to_piece(tokens[0]) == _SPACE:
        return tokens[1:]
    # The space that it has is part of a longer piece, or it has none and needs one, which is cut off at the
    # start of a text: spell the word behind something.
    guard = list(tokenizer.encode(_GUARD))
    guarded = list(tokenizer.encode(_GUARD + " " * spaced + text))
    behind = guarded[len(guard) :]
    if guarded[: len(guard)] != guard or not behind or _begins_with_space(tokenizer, behind) != spaced:
        return tokens
    return behind


def _begins_with_space(tokenizer: Tokenizer, tokens: Sequence[int]) -> bool:
    return tokenizer.id_to_piece(tokens[0]).startswith(_SPACE)


def _units(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[list[int]]:
    units: list[list[int]] = []
    texts: list[bytes] = []
    open_bytes = 0  # of a character that has begun
    for token in tokens:
        piece = tokenizer.id_to_piece(token)
        is_byte = tokenizer.is_byte(token)
        text = bytes([int(piece[3:5], 16)]) if is_byte else piece.encode()
        goes_on = is_byte and open_bytes > 0 and 0x80 <= text[0] < 0xC0
        open_bytes = open_bytes - 1 if goes_on else _following_bytes(text[0]) if is_byte else 0
        if units and (goes_on or texts[-1] == _SPACE.encode()):
            units[-1].append(token)
            texts[-1] += text
        else:
            units.append([token])
            texts.append(text)
    return _with_marks(units, [text.decode(errors="replace").lstrip(_SPACE) for text in texts])


def _following_bytes(first: int) -> int:
    """How many bytes of a character follow its first one in UTF-8."""
    return (first >= 0xC2) + (first >= 0xE0) + (first >= 0xF0)


def _with_marks(units: list[list[int]], texts: list[str]) -> list[list[int]]:
    """The same, but accents and joined pictures stay with what they belong to."""
    joined: list[list[int]] = []
    before = ""
    for unit, text in zip(units, texts, strict=True):
        if joined and (_is_mark(text[:1]) or before.endswith(_JOINER)):
            joined[-1] += unit
        else:
            joined.append(unit)
        before = text
    return joined


def _is_mark(char: str) -> bool:
    is_skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    return char == _JOINER or is_skin_tone or unicodedata.category(char or "a")[0] == "M"
