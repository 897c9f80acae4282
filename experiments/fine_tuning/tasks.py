"""What is heard again: patterns, at once or after a time.

Shapes: B sequences, T tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NUM_SYMBOLS = 24
PERIOD = 32

Filler = Literal["same", "other"]


class Episode(NamedTuple):
    """Sequences of one length, and which of their tokens only a memory can know."""

    codes: Tensor  # [B, 1, T]
    scored: Tensor  # [T], bool


@dataclass(frozen=True)
class ThreeTimes:
    """A random pattern of 32 tokens, three times over; each sequence has one of its own.

    Scored is everything after the first time.
    """

    @property
    def num_tokens_known(self) -> int:
        """Tokens that the model must know."""
        return NUM_SYMBOLS

    def draw(self, size: int, generator: torch.Generator) -> Episode:
        """Fresh sequences."""
        pattern = torch.randint(NUM_SYMBOLS, (size, 1, PERIOD), generator=generator)
        return Episode(pattern.repeat(1, 1, 3), torch.arange(3 * PERIOD) >= PERIOD)


@dataclass(frozen=True)
class AfterAGap:
    """A random pattern of 32 tokens, random tokens in between, and the pattern again.

    Scored is the second time from its third token on: nobody can know where it begins.

    Attributes:
        filler: what comes in between: symbols of the pattern's own kind (`same`), which nothing tells from
            what must be kept, or other ones (`other`).
        longest: gaps are drawn log-uniformly from 0 to so many tokens.
    """

    filler: Filler
    longest: int

    @property
    def num_tokens_known(self) -> int:
        """Tokens that the model must know."""
        return NUM_SYMBOLS if self.filler == "same" else 2 * NUM_SYMBOLS

    def draw(self, size: int, generator: torch.Generator, *, gap: int | None = None) -> Episode:
        """Fresh sequences with one gap, None: drawn."""
        if gap is None:
            exponent = torch.rand((), generator=generator).item() * math.log(self.longest + 1)
            gap = round(math.exp(exponent)) - 1
        pattern = torch.randint(NUM_SYMBOLS, (size, 1, PERIOD), generator=generator)
        between = torch.randint(NUM_SYMBOLS, (size, 1, gap), generator=generator)
        if self.filler == "other":
            between += NUM_SYMBOLS
        codes = torch.cat([pattern, between, pattern], 2)
        return Episode(codes, torch.arange(codes.shape[2]) >= PERIOD + gap + 2)


Task = ThreeTimes | AfterAGap
