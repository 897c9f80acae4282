"""Dialogues in which Moshi says a code of random words, and says it again later.

Time is counted in frames of 80 ms. All speech starts on a frame and lasts whole frames, so that the same
words have the same codes both times.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.lines import PAUSE_FRAMES, Line

Kind = Literal["echo", "recall"]

WINDOW = 8  # frames that a layer's attention sees
NUM_LAYERS = 3
REACH = (WINDOW - 1) * NUM_LAYERS  # frames back that anything travels by attention
CHUNK_FRAMES = 108  # of the configurations: a dialogue is one chunk
WORD_FRAMES = 2  # of a word of a code
ECHO_WORDS = 3  # so that they come back within the window
RECALL_WORDS = 8

_MAX_FRAMES = 101  # of speech; what follows is the silence at the end of a recording

CODE_WORDS = (
    *("red", "blue", "green", "pink", "black", "white", "gold", "brown"),
    *("cat", "dog", "fox", "bear", "wolf", "deer", "goat", "duck"),
    *("rose", "leaf", "tree", "sun", "moon", "star", "rain", "snow"),
)


CUE = Line(MAIN, "The code is")
QUESTIONS = tuple(
    Line(USER, text) for text in ("What was the code?", "Say the code again.", "Tell me the code, please.")
)
REMARKS = tuple(
    Line(USER, text)
    for text in (
        "It rained all night.",
        "I had tea with my sister.",
        "The bus was late.",
        "We went to the lake.",
        "My coffee is cold.",
        "The shop is closed.",
        "I lost my umbrella.",
        "He plays the violin.",
        "She lives near the park.",
        "We need more bread.",
    )
)
ANSWERS = tuple(
    Line(MAIN, text)
    for text in (
        "I see.",
        "That is nice.",
        "Okay.",
        "How lovely.",
        "Really?",
        "Tell me more.",
        "I am sorry.",
        "Good idea.",
    )
)
WORD_LINES = tuple(Line(MAIN, word) for word in CODE_WORDS)


@dataclass(frozen=True)
class Dialogue:
    """A planned dialogue.

    Attributes:
        turns: the lines of each, in order; there are `PAUSE_FRAMES` of silence before every turn.
        first, second: the frames in which the words of its codes start, when they are said for the first and
            for the second time, word by word.
    """

    turns: Sequence[Sequence[Line]]
    first: Sequence[int]
    second: Sequence[int]


def make_dialogue(kind: Kind, seed: str, num_frames: Mapping[Line, int]) -> Dialogue:
    """Write one dialogue.

    Args:
        kind: `echo`, codes that are said twice in a row, so that attention can see the first time; `recall`,
            one code that is said again when attention cannot see anything of the first time any more.
        seed: any text; the same text gives the same dialogue.
        num_frames: how long each line takes.
    """
    writer = _Writer(random.Random(seed), num_frames)
    return writer.echo() if kind == "echo" else writer.recall()


def make_sentences(seed: str, *, count: int) -> Iterator[str]:
    """Yield lines such as the dialogues have, to train a tokenizer."""
    rng = random.Random(seed)
    others = (*QUESTIONS, *REMARKS, *ANSWERS)
    for number in range(count):
        code = " ".join(rng.choices(CODE_WORDS, k=RECALL_WORDS))
        yield f"{CUE.text} {code}" if number % 2 else rng.choice(others).text


class _Writer:
    """The state of one dialogue while it is written."""

    def __init__(self, rng: random.Random, num_frames: Mapping[Line, int]) -> None:
        self.rng = rng
        self.num_frames = num_frames
        self.frame = 0
        self.turns: list[Sequence[Line]] = []

    def echo(self) -> Dialogue:
        """Short codes, each said twice in a row, with remarks of the user in between."""
        first: list[int] = []
        second: list[int] = []
        while True:
            code = self.draw_code(ECHO_WORDS)
            remark = self.rng.choice(REMARKS)
            if self.frame + self.length(CUE, *code, *code) + self.length(remark) > _MAX_FRAMES:
                return Dialogue(self.turns, first, second)
            starts = self.say(CUE, *code, *code)[1:]
            first += starts[:ECHO_WORDS]
            second += starts[ECHO_WORDS:]
            self.say(remark)

    def recall(self) -> Dialogue:
        """A code, talk about something else, and the code again on request."""
        code = self.draw_code(RECALL_WORDS)
        question = self.rng.choice(QUESTIONS)
        end = self.length(question) + self.length(CUE, *code)
        first = self.say(CUE, *code)[1:]
        while True:
            remark, answer = self.rng.choice(REMARKS), self.rng.choice(ANSWERS)
            if self.frame + self.length(remark) + self.length(answer) + end > _MAX_FRAMES:
                break
            self.say(remark)
            self.say(answer)
        self.say(question)
        second = self.say(CUE, *code)[1:]
        assert second[0] - (first[-1] + WORD_FRAMES) > REACH, "attention reaches back to the first time"
        return Dialogue(self.turns, first, second)

    def draw_code(self, num_words: int) -> list[Line]:
        """Random words, of which any may come more than once."""
        return self.rng.choices(WORD_LINES, k=num_words)

    def say(self, *lines: Line) -> list[int]:
        """Add a turn after a pause; returns the frame in which each of its lines starts."""
        self.frame += PAUSE_FRAMES
        self.turns.append(lines)
        starts = []
        for line in lines:
            starts.append(self.frame)
            self.frame += self.num_frames[line]
        return starts

    def length(self, *lines: Line) -> int:
        """Frames of a turn with its pause."""
        return PAUSE_FRAMES + sum(self.num_frames[line] for line in lines)
