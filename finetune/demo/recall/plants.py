"""What is said once and needed later: of four kinds, four different words, drawn anew for every conversation.

Two in three are for training, the others for measuring, by their words: none is in both.
"""

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.lines import Line

Split = Literal["train", "eval"]

NUM_WORDS = 4
WORDS: Mapping[str, tuple[str, ...]] = {
    "name": ("Ann", "Ben", "Carl", "Dave", "Eve", "Frank", "Grace", "Hugh", "Jane", "Kate", "Luke", "May"),
    "number": (
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "eight",
        "nine",
        "ten",
        "twelve",
        "half",
        "nought",
    ),
    "place": (
        "Rome",
        "Leeds",
        "York",
        "Bath",
        "Nice",
        "Bonn",
        "Ghent",
        "Prague",
        "Cork",
        "Hull",
        "Fez",
        "Lyon",
    ),
    "wish": (
        "tea",
        "milk",
        "bread",
        "soup",
        "rice",
        "fish",
        "cake",
        "plums",
        "cheese",
        "jam",
        "nuts",
        "eggs",
    ),
}
SAID_BY: Mapping[str, str] = {"moshi": MAIN, "user": USER}
LEADS: Mapping[str, str] = {kind: f"The {kind} is" for kind in WORDS}
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    kind: (f"What was the {kind}?", f"Say the {kind} again.", f"Tell me the {kind}, please.")
    for kind in WORDS
}


@dataclass(frozen=True)
class Plant:
    """Something to be remembered.

    Attributes:
        kind: of `WORDS`.
        words: `NUM_WORDS` of them.
    """

    kind: str
    words: tuple[str, ...]

    @property
    def split(self) -> Split:
        """Whether it is for training or for measuring."""
        text = f"{self.kind} {' '.join(self.words)}"
        return "eval" if zlib.crc32(text.encode()) % 3 == 0 else "train"

    def lines(self, speaker: str) -> tuple[Line, ...]:
        """As it is said."""
        return (Line(speaker, LEADS[self.kind]), *(Line(speaker, word) for word in self.words))


def draw_plant(rng: random.Random, kind: str, split: Split) -> Plant:
    """A plant of a kind that is for training or for measuring."""
    while True:
        plant = Plant(kind, tuple(rng.sample(WORDS[kind], NUM_WORDS)))
        if plant.split == split:
            return plant


def word_lines() -> list[Line]:
    """Every word that a plant may have, in both voices."""
    return [Line(speaker, word) for speaker in (MAIN, USER) for words in WORDS.values() for word in words]


def other_lines() -> list[Line]:
    """How plants begin, in both voices, and the questions for them."""
    leads = [Line(speaker, lead) for speaker in (MAIN, USER) for lead in LEADS.values()]
    return leads + [Line(USER, question) for questions in QUESTIONS.values() for question in questions]
