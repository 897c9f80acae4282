"""What is heard again: patterns, at once or after a time, and values of keys.

Shapes: B sequences, T tokens.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NUM_SYMBOLS = 24
PERIOD = 32
SHORTEST = 16
NUM_KEYS, NUM_VALUES, FEWEST_PAIRS = 128, 64, 4

Filler = Literal["same", "other", "silence"]


class Episode(NamedTuple):
    """Sequences of one length, and which of their tokens only a memory can know."""

    codes: Tensor  # [B, 1, T]
    scored: Tensor  # [T], bool


@dataclass(frozen=True)
class Task(ABC):
    """What a model hears; of symbols, unless a task says otherwise."""

    @property
    def num_tokens_known(self) -> int:
        """Tokens that the model must know."""
        return NUM_SYMBOLS

    @property
    def guessing(self) -> float:
        """Loss of a token of which nothing is known but its kind, nats."""
        return math.log(NUM_SYMBOLS)

    @property
    def remark(self) -> str:
        """For the tables."""
        return ""

    @abstractmethod
    def draw(self, size: int, generator: torch.Generator, *, difficulty: int | None = None) -> Episode:
        """Fresh sequences of one difficulty.

        Args:
            size: B.
            generator: of the draws.
            difficulty: what makes the task harder, where it has such a thing; None: drawn.
        """


@dataclass(frozen=True)
class ThreeTimes(Task):
    """A random pattern of 32 tokens, three times over; each sequence has one of its own.

    Scored is everything after the first time.
    """

    def draw(self, size: int, generator: torch.Generator, *, difficulty: int | None = None) -> Episode:
        """Fresh sequences; all are equally difficult."""
        pattern = torch.randint(NUM_SYMBOLS, (size, 1, PERIOD), generator=generator)
        return Episode(pattern.repeat(1, 1, 3), torch.arange(3 * PERIOD) >= PERIOD)


@dataclass(frozen=True)
class AfterAGap(Task):
    """A random pattern of 32 tokens, random tokens in between, and the pattern again.

    Scored is the second time from its third token on: nobody can know where it begins.

    Attributes:
        filler: what comes in between: symbols of the pattern's own kind (`same`), which nothing tells from
            what must be kept, other ones (`other`), or one and the same of these (`silence`).
        longest: gaps are drawn log-uniformly from 0 to so many tokens.
    """

    filler: Filler
    longest: int

    @property
    def num_tokens_known(self) -> int:
        """Tokens that the model must know."""
        return NUM_SYMBOLS if self.filler == "same" else 2 * NUM_SYMBOLS

    @property
    def remark(self) -> str:
        """For the tables."""
        return f", {self.filler} symbols in between" if self.filler != "silence" else ", silence in between"

    def draw(self, size: int, generator: torch.Generator, *, difficulty: int | None = None) -> Episode:
        """Fresh sequences; their difficulty is the gap in tokens."""
        gap = difficulty
        if gap is None:
            exponent = torch.rand((), generator=generator).item() * math.log(self.longest + 1)
            gap = round(math.exp(exponent)) - 1
        pattern = torch.randint(NUM_SYMBOLS, (size, 1, PERIOD), generator=generator)
        between = torch.randint(NUM_SYMBOLS, (size, 1, gap), generator=generator)
        if self.filler != "same":
            between = NUM_SYMBOLS + (between if self.filler == "other" else 0 * between)
        codes = torch.cat([pattern, between, pattern], 2)
        return Episode(codes, torch.arange(codes.shape[2]) >= PERIOD + gap + 2)


@dataclass(frozen=True)
class Twice(Task):
    """A random pattern, and at once the pattern again.

    Scored is the second time from its third token on: nobody can know where it begins.

    Attributes:
        longest: lengths are drawn log-uniformly from 16 to so many tokens.
    """

    longest: int

    def draw(self, size: int, generator: torch.Generator, *, difficulty: int | None = None) -> Episode:
        """Fresh sequences; their difficulty is the length of the pattern."""
        number = _log_uniform(SHORTEST, self.longest, generator) if difficulty is None else difficulty
        pattern = torch.randint(NUM_SYMBOLS, (size, 1, number), generator=generator)
        return Episode(pattern.repeat(1, 1, 2), torch.arange(2 * number) >= number + 2)


@dataclass(frozen=True)
class Pairs(Task):
    """Multi-query associative recall (Arora et al. 2023, "Zoology"): keys with values, then every key again.

    Scored are the values of the second time, 64 to choose from. Keys are asked for in another order than
    they were given in.

    Attributes:
        most: pairs are drawn log-uniformly from 4 to so many.
    """

    most: int

    @property
    def num_tokens_known(self) -> int:
        """Tokens that the model must know."""
        return NUM_KEYS + NUM_VALUES

    @property
    def guessing(self) -> float:
        """Loss of a token of which nothing is known but its kind, nats."""
        return math.log(NUM_VALUES)

    def draw(self, size: int, generator: torch.Generator, *, difficulty: int | None = None) -> Episode:
        """Fresh sequences; their difficulty is the number of pairs."""
        number = _log_uniform(FEWEST_PAIRS, self.most, generator) if difficulty is None else difficulty
        keys = torch.rand(size, NUM_KEYS, generator=generator).argsort(1)[:, :number]
        values = NUM_KEYS + torch.randint(NUM_VALUES, (size, number), generator=generator)
        order = torch.rand(size, number, generator=generator).argsort(1)
        given = torch.stack([keys, values], 2).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
        scored = torch.arange(4 * number) >= 2 * number
        scored[::2] = False
        return Episode(torch.cat([given, asked], 1)[:, None], scored)


def _log_uniform(least: int, most: int, generator: torch.Generator) -> int:
    exponent = torch.rand((), generator=generator).item() * math.log((most + 1) / least)
    return int(least * math.exp(exponent))
