"""Lines of dialogues that are always said alike: each is spoken once, in whole frames, and put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.data.words import Word
from finetune.demo.speech.dialogues import Turn
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.render import write_dialogue
from finetune.demo.speech.word_times import SAMPLE_RATE, Speech, speak

FRAME_SAMPLES = 1920
PAUSE_FRAMES = 1  # before each turn

_SILENCE = 0.004  # amplitude below which nothing is heard; full scale is 1
_FADE_SAMPLES = 480  # where a line is cut


class Line(NamedTuple):
    """Something said without a break, always with the same sound.

    Attributes:
        speaker: `SPEAKER_MAIN` or `SPEAKER_USER`.
        text: the words.
    """

    speaker: str
    text: str


def speak_line(espeak: Espeak, line: Line, voice: EspeakVoice, *, num_frames: int | None = None) -> Speech:
    """A line without the silence around it, filled up to whole frames, or cut to a number of them."""
    spoken = speak(espeak, line.text, voice)
    loud = np.flatnonzero(np.abs(spoken.samples) > _SILENCE)
    heard = spoken.samples[loud[0] : loud[-1] + 1]
    length = (num_frames or -(-len(heard) // FRAME_SAMPLES)) * FRAME_SAMPLES
    samples = np.zeros(length, dtype=np.float32)
    samples[: len(heard)] = heard[:length]
    if len(heard) > length:
        samples[-_FADE_SAMPLES:] *= np.linspace(1, 0, _FADE_SAMPLES, dtype=np.float32)
    start_sec, length_sec = loud[0] / SAMPLE_RATE, length / SAMPLE_RATE
    words = [
        Word(word.text, max(0.0, word.start_sec - start_sec), min(word.end_sec - start_sec, length_sec))
        for word in spoken.words
    ]
    return Speech(samples, words)


def num_frames(speech: Speech) -> int:
    """How long a line takes."""
    return len(speech.samples) // FRAME_SAMPLES


def write_lines(turns: Sequence[Sequence[Line]], lines: Mapping[Line, Speech], wav_path: Path) -> float:
    """Write turns of lines with their word timings, see `write_dialogue`; returns the duration in seconds.

    Args:
        turns: the lines of each, in order; there are `PAUSE_FRAMES` of silence before every turn.
        lines: how they sound.
        wav_path: where to write; the word timings go beside it with the suffix `.json`.
    """
    gap_sec = PAUSE_FRAMES * FRAME_SAMPLES / SAMPLE_RATE
    planned = [Turn(said[0].speaker, " ".join(line.text for line in said), gap_sec) for said in turns]
    return write_dialogue(planned, [_join([lines[line] for line in said]) for said in turns], wav_path)


def _join(parts: Sequence[Speech]) -> Speech:
    """Lines one directly after the other."""
    words: list[Word] = []
    offset_sec = 0.0
    for part in parts:
        words += [Word(w.text, w.start_sec + offset_sec, w.end_sec + offset_sec) for w in part.words]
        offset_sec += len(part.samples) / SAMPLE_RATE
    return Speech(np.concatenate([part.samples for part in parts]), words)
