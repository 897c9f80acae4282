"""Writes a folder of items for `evaluate.py recall`."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.demo.recall.dialogues import make_filler
from finetune.demo.recall.plants import QUESTIONS, SAID_BY, WORDS, Plant, draw_plant
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.lines import Line, num_frames, write_lines
from finetune.demo.speech.word_times import Speech
from finetune.evaluation.recall.items import FILLER_DIR, ITEMS_FILE

PLANTS_PER_GROUP = 4

_NUM_FILLERS = 40
_FILLER_FRAMES = 125  # 10 s


def write_items(folder: Path, lines: Mapping[Line, Speech], *, num_items: int, seed: int) -> None:
    """Make groups of four items, of all kinds in turn, said by Moshi and by the user; no plant comes twice.

    Args:
        folder: to make.
        lines: how they sound.
        num_items: conversations; rounded up to whole groups.
        seed: the same arguments give the same items.
    """
    writer = _Writer(folder, lines)
    writer.fill(seed)
    rng, used, entries = random.Random(f"{seed}/items"), set[Plant](), []
    kinds = itertools.cycle(itertools.product(WORDS, SAID_BY))
    for number in range(-(-num_items // PLANTS_PER_GROUP)):
        kind, said_by = next(kinds)
        plants = _draw(rng, kind, used)
        question = rng.randrange(len(QUESTIONS[kind]))
        entry = {
            "id": f"{kind}-{said_by}-{number:04d}",
            "kind": kind,
            "said_by": said_by,
            "plants": [writer.write(plant, SAID_BY[said_by]) for plant in plants],
            "cue": writer.ask(kind, question),
            "answers": [writer.write(plant, MAIN) for plant in plants],
        }
        entries.append(json.dumps(entry))
    (folder / ITEMS_FILE).write_text("\n".join(entries) + "\n")


def _draw(rng: random.Random, kind: str, used: set[Plant]) -> list[Plant]:
    """Plants that training never has and no earlier group had."""
    plants: list[Plant] = []
    while len(plants) < PLANTS_PER_GROUP:
        plant = draw_plant(rng, kind, "eval")
        if plant not in used:
            used.add(plant)
            plants.append(plant)
    return plants


class _Writer:
    """Recordings of a folder, each written once."""

    def __init__(self, folder: Path, lines: Mapping[Line, Speech]) -> None:
        self._folder, self._lines = folder, lines
        for name in ("said", "asked", FILLER_DIR):
            (folder / name).mkdir(parents=True)

    def fill(self, seed: int) -> None:
        """Recordings of talk about something else."""
        lengths = {line: num_frames(speech) for line, speech in self._lines.items()}
        for number in range(_NUM_FILLERS):
            turns = make_filler(f"{seed}/filler/{number}", lengths, length=_FILLER_FRAMES)
            self._write(f"{FILLER_DIR}/{number:02d}.wav", turns)

    def write(self, plant: Plant, speaker: str) -> str:
        """A plant in a voice."""
        voice = "moshi" if speaker == MAIN else "user"
        return self._write(f"said/{plant.kind}_{'_'.join(plant.words)}.{voice}.wav", [plant.lines(speaker)])

    def ask(self, kind: str, number: int) -> str:
        """One of the questions for a kind."""
        return self._write(f"asked/{kind}_{number}.wav", [[Line(USER, QUESTIONS[kind][number])]])

    def _write(self, path: str, turns: Sequence[Sequence[Line]]) -> str:
        if not (self._folder / path).exists():
            write_lines(turns, self._lines, self._folder / path)
        return path
