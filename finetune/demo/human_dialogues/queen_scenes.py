"""Scenes of Flight of the Amazon Queen that run by themselves: the `.CUT` files.

A scene is a list of steps, each of an object, which walks, moves or speaks one sentence; Joe is object 0. How
long a step is depends on its kind, and that on whether the object is a person, which `QUEEN.JAS` says. The
layout is known from ScummVM's cutaway.cpp, logic.cpp and structs.h.
"""

import struct
from typing import NamedTuple

from finetune.demo.human_dialogues.material import Line
from finetune.demo.human_dialogues.queen_archive import Archive, read_numbers, read_text
from finetune.demo.human_dialogues.queen_lines import sentence_lines

_JOE = 0
_FADE = -1  # stands for Joe, with the room faded in
_TEXTS = (-2, -3, -4)  # no object: text on the screen
_PERSON_IMAGES = (-3, -4)
_STEP_NUMBERS = 17
_FRAME_BYTES = 18
_LAST_FRAME = -2
_OBJECT_BYTES = 16
_UNREAD_BYTES = 2  # between the last step and what follows the steps


class Step(NamedTuple):
    """Who does it, 0 for Joe, and what is said: empty or `*` where nothing is."""

    speaker: int
    sentence: str


def find_persons(data: bytes) -> frozenset[int]:
    """The numbers of the objects that are persons.

    Args:
        data: `QUEEN.JAS` without its header.

    Raises:
        struct.error: it is damaged.
    """
    (count,) = read_numbers(data, 4, 1)
    images = (
        read_numbers(data, 8 + _OBJECT_BYTES * index + _OBJECT_BYTES - 2, 1)[0] for index in range(count)
    )
    return frozenset(number for number, image in enumerate(images, 1) if image in _PERSON_IMAGES)


def read_scene(data: bytes, persons: frozenset[int]) -> list[Step]:
    """Read a `.CUT` file.

    Args:
        data: without its header.
        persons: numbers of objects that are persons.

    Raises:
        struct.error: the file is damaged, or an object becomes a person during the game only.
    """
    _, count, _, steps_end, text_offset, _ = read_numbers(data, 0, 6)
    offset = 12
    _, text_offset = read_text(data, text_offset, align=2)
    steps = []
    for _ in range(abs(count)):
        numbers = read_numbers(data, offset, _STEP_NUMBERS)
        who, animation, execute, copied_from = numbers[0], numbers[4], numbers[5], numbers[12]
        offset += 2 * _STEP_NUMBERS
        (num_present,) = read_numbers(data, offset, 1)
        offset += 2 + 2 * num_present
        sentence, text_offset = read_text(data, text_offset, align=2)
        who = _JOE if who == _FADE else who
        speaks = not animation and (who == _JOE or who in persons)
        if who not in _TEXTS and not speaks and execute and copied_from <= 0:
            offset = _skip_frames(data, offset)
        steps.append(Step(who, sentence if speaks and copied_from <= 0 else ""))
    if offset + _UNREAD_BYTES != steps_end:
        raise struct.error("its steps do not end where it says")
    return steps


def scene_lines(archive: Archive, name: str, persons: frozenset[int]) -> list[Line] | None:
    """The lines of a `.CUT` file in which Joe and one other person speak; None: it is another one.

    Args:
        archive: with the file and the recordings.
        name: of the file.
        persons: numbers of objects that are persons.
    """
    try:
        steps = read_scene(archive.read_script(name), persons)
    except struct.error:
        return None
    lines: list[Line] = []
    speakers = set()
    base = name.removesuffix(".CUT").ljust(5, "_")
    for number, step in enumerate(steps, 1):
        found = sentence_lines(archive, f"{base}{number:02d}", step.sentence, by_first=step.speaker == _JOE)
        spoken = list(found)
        lines += spoken
        speakers |= {step.speaker} if spoken else set()
    return lines if len(speakers) == 2 and _JOE in speakers else None


def _skip_frames(data: bytes, offset: int) -> int:
    """The offset behind the frames of an animation."""
    while read_numbers(data, offset, 1)[0] != _LAST_FRAME:
        offset += 2 + _FRAME_BYTES
    return offset + 2
