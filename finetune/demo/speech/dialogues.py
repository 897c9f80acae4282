"""Seeded dialogues between Moshi (the main speaker) and a user, in which early facts come back late."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.data.words import SPEAKERS
from finetune.demo.speech.sentences import (
    ANSWER_TAILS,
    BACKCHANNELS,
    CLOSINGS,
    FACTS,
    LEADS,
    OPENINGS,
    RECALL_LEADS,
    SLOTS,
    TOPICS,
    Fact,
)

MAIN, USER = SPEAKERS

# Measured on the synthesiser at the speeds of `recording.py`; only used to plan the length of a dialogue.
_CHARS_PER_SEC = 16.5
_TELLING_SHARE = 0.35  # share of a dialogue during which new facts are told
_CLOSING_SEC = 9.0
_SEC_PER_FACT = 18.0


@dataclass(frozen=True)
class Turn:
    """One uninterrupted stretch of speech.

    Attributes:
        speaker: `SPEAKER_MAIN` or `SPEAKER_USER`.
        text: what is said, words separated by single spaces.
        gap_sec: silence between the end of all earlier speech and this turn; negative: it overlaps.
    """

    speaker: str
    text: str
    gap_sec: float


def make_dialogue(seed: str, *, duration_sec: float) -> list[Turn]:
    """Write one dialogue.

    Args:
        seed: any text; the same text gives the same dialogue.
        duration_sec: how long the dialogue should take when spoken. It comes out a few seconds off, and
            never shorter than an opening, one fact with its recall and a closing (about 20 s).

    Returns:
        The turns in order of speech; every fact that is told is asked for again, if time allows.
    """
    return _Writer(random.Random(seed), duration_sec).write()


def make_sentences(seed: str, *, count: int) -> Iterator[str]:
    """Yield `count` turns of dialogues that differ from those of every other seed, to train a tokenizer."""
    part = 0
    while count > 0:
        for turn in make_dialogue(f"{seed}/{part}", duration_sec=180.0)[:count]:
            yield turn.text
            count -= 1
        part += 1


class _Writer:
    """The state of one dialogue while it is written."""

    def __init__(self, rng: random.Random, duration_sec: float) -> None:
        self.rng = rng
        self.duration_sec = duration_sec
        self.elapsed_sec = 0.0
        self.turns: list[Turn] = []
        self.name = rng.choice(SLOTS["name"])
        self.topics = self.shuffled_topics()

    def write(self) -> list[Turn]:
        """The turns of a whole dialogue."""
        self.open()
        max_facts = max(1, min(len(FACTS), round(self.duration_sec / _SEC_PER_FACT)))
        untold = self.rng.sample(FACTS, max_facts)
        told: list[tuple[Fact, dict[str, str]]] = []
        while untold and (not told or self.elapsed_sec < _TELLING_SHARE * self.duration_sec):
            told.append(self.tell(untold.pop()))
            if self.rng.random() < 0.3 and self.elapsed_sec < _TELLING_SHARE * self.duration_sec:
                self.talk()
        waiting = list(told)
        self.recall(*waiting.pop(0))
        while self.elapsed_sec < self.duration_sec - _CLOSING_SEC:
            if waiting and self.rng.random() < 0.5:
                self.recall(*waiting.pop(0))
            else:
                self.talk()
        self.close(self.rng.sample(told, min(2, len(told))))
        return self.turns

    def open(self) -> None:
        """Greetings."""
        slots = self.draw_slots()
        for speaker, line in zip((MAIN, USER, MAIN), self.rng.choice(OPENINGS), strict=True):
            self.say(speaker, line.format_map(slots))

    def tell(self, fact: Fact) -> tuple[Fact, dict[str, str]]:
        """The user tells a fact; returns it with the words that it was told with."""
        slots = self.draw_slots()
        self.say(USER, self.with_lead(LEADS, fact.tell.format_map(slots)))
        self.say(MAIN, fact.ack.format_map(slots))
        return fact, slots

    def recall(self, fact: Fact, slots: dict[str, str]) -> None:
        """The user asks for a fact told before, Moshi answers."""
        self.say(USER, self.with_lead(RECALL_LEADS, fact.ask.format_map(slots)))
        self.say(MAIN, (fact.answer + self.rng.choice(ANSWER_TAILS)).format_map(slots))

    def talk(self) -> None:
        """An exchange about a topic that is not used up yet."""
        if not self.topics:
            self.topics = self.shuffled_topics()
        lines = self.topics.pop()
        slots = self.draw_slots()
        for speaker, line in zip((USER, MAIN, USER, MAIN), lines, strict=True):
            text = line.format_map(slots)
            self.say(speaker, self.with_lead(LEADS, text) if line is lines[0] else text)

    def close(self, facts: list[tuple[Fact, dict[str, str]]]) -> None:
        """Goodbyes, with some of the facts once more."""
        recap = ", and ".join(fact.recap.format_map(slots) for fact, slots in facts)
        for speaker, line in zip((USER, MAIN), self.rng.choice(CLOSINGS), strict=True):
            self.say(speaker, line.format(recap=recap, name=self.name))

    def say(self, speaker: str, text: str) -> None:
        """Add a turn, and now and then a word of the listener into its end."""
        gap_sec = -0.15 if self.rng.random() < 0.06 else self.rng.uniform(0.25, 0.9)
        self.add(Turn(speaker, text, round(gap_sec, 3) if self.turns else 0.4))
        if len(text) > 40 and self.rng.random() < 0.1:
            listener = USER if speaker == MAIN else MAIN
            self.add(Turn(listener, self.rng.choice(BACKCHANNELS), -1.0))

    def add(self, turn: Turn) -> None:
        """Append a turn and estimate how long it lasts."""
        self.turns.append(turn)
        self.elapsed_sec += max(0.0, turn.gap_sec + len(turn.text) / _CHARS_PER_SEC)

    def with_lead(self, leads: tuple[str, ...], text: str) -> str:
        """A text behind one of the leads, its first letter to match."""
        lead = self.rng.choice(leads)
        if lead.endswith(", ") and text.split()[0] not in _ALWAYS_CAPITAL:
            text = text[0].lower() + text[1:]
        return lead + text

    def draw_slots(self) -> dict[str, str]:
        """A word for every slot of the templates."""
        return {slot: self.rng.choice(words) for slot, words in SLOTS.items()} | {"name": self.name}

    def shuffled_topics(self) -> list[tuple[str, ...]]:
        """All topics in a new order."""
        return self.rng.sample(TOPICS, len(TOPICS))


_ALWAYS_CAPITAL = {"I", "I'm", "I'd", *SLOTS["friend"]}
