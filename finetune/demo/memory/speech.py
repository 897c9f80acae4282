"""The sound of the dialogues: every line is spoken once, and is the same wherever it is said."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from finetune.data.words import Word
from finetune.demo.memory.dialogues import (
    ANSWERS,
    CUE,
    PAUSE_FRAMES,
    QUESTIONS,
    REMARKS,
    WORD_FRAMES,
    WORD_LINES,
    Dialogue,
    Line,
)
from finetune.demo.speech.dialogues import MAIN, Turn
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.demo.speech.render import write_dialogue
from finetune.demo.speech.word_times import SAMPLE_RATE, Speech, speak

FRAME_SAMPLES = 1920

_MAIN_VOICE = EspeakVoice("en-us", words_per_minute=170, pitch=42)
_CODE_VOICE = EspeakVoice("en-us", words_per_minute=330, pitch=42)  # a word lasts two frames
_USER_VOICE = EspeakVoice("en-gb-x-rp+f1", words_per_minute=175, pitch=55)
_SILENCE = 0.004  # amplitude below which nothing is heard; full scale is 1
_FADE_SAMPLES = 480  # where a line is cut


def speak_lines() -> dict[Line, Speech]:
    """Speak all lines, each in whole frames; from the start of a process always the same."""
    espeak = Espeak()
    lines = {line: _speak_line(espeak, line) for line in (CUE, *QUESTIONS, *REMARKS, *ANSWERS)}
    codes = {line: _speak_line(espeak, line, num_frames=WORD_FRAMES) for line in WORD_LINES}
    return lines | codes


def num_frames(speech: Speech) -> int:
    """How long a line takes."""
    return len(speech.samples) // FRAME_SAMPLES


def write_recording(dialogue: Dialogue, lines: Mapping[Line, Speech], wav_path: Path) -> float:
    """Write a dialogue with its word timings, see `write_dialogue`, and return its duration in seconds."""
    gap_sec = PAUSE_FRAMES * FRAME_SAMPLES / SAMPLE_RATE
    turns = [Turn(said[0].speaker, " ".join(line.text for line in said), gap_sec) for said in dialogue.turns]
    return write_dialogue(turns, [_join([lines[line] for line in said]) for said in dialogue.turns], wav_path)


def _speak_line(espeak: Espeak, line: Line, num_frames: int | None = None) -> Speech:
    """A line without the silence around it, filled up to whole frames, or cut to a number of them."""
    voice = _CODE_VOICE if num_frames else _MAIN_VOICE if line.speaker == MAIN else _USER_VOICE
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


def _join(parts: Sequence[Speech]) -> Speech:
    """Lines one directly after the other."""
    words: list[Word] = []
    offset_sec = 0.0
    for part in parts:
        words += [Word(w.text, w.start_sec + offset_sec, w.end_sec + offset_sec) for w in part.words]
        offset_sec += len(part.samples) / SAMPLE_RATE
    return Speech(np.concatenate([part.samples for part in parts]), words)
