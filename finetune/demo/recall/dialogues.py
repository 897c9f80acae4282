"""Dialogues to train on: words that are repeated at once, and plants that are needed later.

Time is counted in frames of 80 ms, see `finetune.demo.memory.dialogues`.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from finetune.demo.memory.dialogues import ANSWERS, REMARKS
from finetune.demo.recall.plants import LEADS, QUESTIONS, SAID_BY, WORDS, draw_plant
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.lines import PAUSE_FRAMES, Line

Kind = Literal["echo", "short", "recall"]
Turns = list[Sequence[Line]]

WINDOW = 8  # frames that a layer's attention sees
NUM_LAYERS = 3
REACH = (WINDOW - 1) * NUM_LAYERS  # frames back that anything travels by attention
WORD_FRAMES = 2  # of a word of a plant
# Of the configurations: a dialogue is one chunk.
CHUNK_FRAMES: Mapping[Kind, int] = {"echo": 256, "short": 108, "recall": 256}
_END_FRAMES = 7  # of silence at the end of a recording
_ECHO_WORDS = 3  # so that they come back within the window
_MAX_PLANTS: Mapping[Kind, int] = {"short": 1, "recall": len(WORDS)}


def make_dialogue(kind: Kind, seed: str, num_frames: Mapping[Line, int]) -> Turns:
    """Write one dialogue.

    Args:
        kind: `echo`, words that somebody says and Moshi repeats at once; `recall`, one to four plants, each
            of which Moshi says when it is asked for it, after a time that is drawn log-uniformly; `short`,
            one plant in a shorter dialogue.
        seed: any text; the same text gives the same dialogue.
        num_frames: how long each line takes.
    """
    writer = _Writer(random.Random(seed), num_frames)
    most = CHUNK_FRAMES[kind] - _END_FRAMES
    return writer.echo(most) if kind == "echo" else writer.recall(most, max_plants=_MAX_PLANTS[kind])


def make_filler(seed: str, num_frames: Mapping[Line, int], *, length: int) -> Turns:
    """Talk about nothing that is asked for, about so many frames of it."""
    writer = _Writer(random.Random(seed), num_frames)
    writer.talk(length)
    return writer.turns


def make_sentences(seed: str, *, count: int) -> Iterator[str]:
    """Yield lines such as the dialogues have, to train a tokenizer."""
    rng = random.Random(seed)
    others = [line.text for line in (*REMARKS, *ANSWERS)]
    others += [question for questions in QUESTIONS.values() for question in questions]
    for number in range(count):
        kind = rng.choice(list(WORDS))
        planted = f"{LEADS[kind]} {' '.join(rng.choices(WORDS[kind], k=4))}"
        yield planted if number % 2 else rng.choice(others)


class _Writer:
    """The state of one dialogue while it is written."""

    def __init__(self, rng: random.Random, num_frames: Mapping[Line, int]) -> None:
        self.rng, self.num_frames = rng, num_frames
        self.frame = 0
        self.turns: Turns = []

    def echo(self, most: int) -> Turns:
        """Words that Moshi or the user says, repeated by Moshi at once, with remarks in between."""
        while True:
            kind, speaker = self.rng.choice(list(WORDS)), self.rng.choice([MAIN, USER])
            words = self.rng.choices(WORDS[kind], k=_ECHO_WORDS)
            first = [Line(speaker, LEADS[kind]), *(Line(speaker, word) for word in words)]
            again = [Line(MAIN, word) for word in words]
            remark = self.rng.choice(REMARKS)
            if self.frame + sum(map(self.length, (first, again, [remark]))) > most:
                return self.turns
            if speaker == MAIN:
                self.say([*first, *again])
            else:
                self.say(first)
                self.say(again)
            self.say([remark])

    def recall(self, most: int, *, max_plants: int) -> Turns:
        """Plants of several kinds, talk about something else, and each plant again when it is asked for."""
        kinds = self.rng.sample(list(WORDS), self.rng.randint(1, max_plants))
        plants = [draw_plant(self.rng, kind, "train") for kind in kinds]
        told = [plant.lines(SAID_BY[self.rng.choice(list(SAID_BY))]) for plant in plants]
        asked = [
            ([Line(USER, self.rng.choice(QUESTIONS[plant.kind]))], plant.lines(MAIN))
            for plant in self.rng.sample(plants, len(plants))
        ]
        left = most - sum(map(self.length, (*told, *itertools.chain(*asked))))
        gap = round(math.exp(self.rng.uniform(math.log(REACH), math.log(left))))
        pauses = self._split(left - gap, 2 * len(plants))
        for said, pause in zip(told, pauses[: len(plants)], strict=True):
            self.talk(pause)
            self.say(said)
        self.talk(gap)
        for (question, answer), pause in zip(asked, pauses[len(plants) :], strict=True):
            self.say(question)
            self.say(answer)
            self.talk(pause)
        return self.turns

    def _split(self, total: int, parts: int) -> list[int]:
        """Parts of a number, drawn at random."""
        ends = sorted(self.rng.randint(0, total) for _ in range(parts - 1))
        return [end - start for start, end in itertools.pairwise([0, *ends, total])]

    def talk(self, most: int) -> None:
        """Remarks and answers of no more than so many frames."""
        end = self.frame + most
        while True:
            turns = [[self.rng.choice(REMARKS)], [self.rng.choice(ANSWERS)]]
            if self.frame + sum(map(self.length, turns)) > end:
                return
            for turn in turns:
                self.say(turn)

    def say(self, lines: Sequence[Line]) -> None:
        """Add a turn after a pause."""
        self.frame += self.length(lines)
        self.turns.append(lines)

    def length(self, lines: Sequence[Line]) -> int:
        """Frames of a turn with its pause."""
        return PAUSE_FRAMES + sum(self.num_frames[line] for line in lines)
