"""What a benchmark of spoken pairs consists of."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Split = Literal["dev", "test"]


@dataclass(frozen=True)
class Item:
    """One audio file.

    Attributes:
        name: unique in its benchmark, as the benchmark names it.
        path: the file. Nothing has listened to it yet.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class Pair:
    """A correct recording and its incorrect counterpart.

    Attributes:
        id: pairs of one id differ in voice only.
        voice: who speaks, empty where nothing says so.
        subtype: a row of tables by subtype, empty where there is none.
        correct, incorrect: the recordings.
    """

    id: str
    voice: str
    subtype: str
    correct: Item
    incorrect: Item


@dataclass(frozen=True)
class Benchmark:
    """Pairs to compare.

    Attributes:
        name: `swuggy`, `sblimp`, `tstory` or `sstory`.
        pairs: at least one.
        failures: items or pairs that are left out, and why: one sentence each.
        failed_ids: the ids of failures, by name, as far as they are known.
    """

    name: str
    pairs: list[Pair]
    failures: dict[str, str] = field(default_factory=dict)
    failed_ids: dict[str, str] = field(default_factory=dict)

    @property
    def ids(self) -> set[str]:
        """Of pairs and of failures."""
        return {pair.id for pair in self.pairs} | set(self.failed_ids.values())

    def items(self) -> Iterator[Item]:
        """Yield every audio file of the pairs once, in their order."""
        seen: set[str] = set()
        for pair in self.pairs:
            for item in (pair.correct, pair.incorrect):
                if item.name not in seen:
                    seen.add(item.name)
                    yield item
