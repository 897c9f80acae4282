"""From text to 24 kHz speech with the start and end of every written word."""

import re
from dataclasses import dataclass

import numpy as np
import soxr

from finetune.data.words import Word
from finetune.demo.speech.espeak import Espeak, EspeakVoice, WordEvent

SAMPLE_RATE = 24_000

_SILENCE = 0.004  # amplitude below which nothing is heard; full scale is 1
_MIN_WORD_SEC = 0.02


@dataclass(frozen=True)
class Speech:
    """Spoken text: samples [num_samples], float32 at 24 kHz, and its words in order."""

    samples: np.ndarray
    words: list[Word]


def speak(espeak: Espeak, text: str, voice: EspeakVoice) -> Speech:
    """Speak a text and align it: one word per whitespace-separated part of `text`."""
    samples, events = espeak.say(text, voice)
    words = align_words(text, events, samples, sample_rate=espeak.sample_rate)
    return Speech(soxr.resample(samples, espeak.sample_rate, SAMPLE_RATE), words)


def align_words(text: str, events: list[WordEvent], samples: np.ndarray, *, sample_rate: int) -> list[Word]:
    """Give every written word its time.

    A word starts at its first event. It lasts until the next word starts, less the silence in between
    (events mark no pauses). Written words that espeak-ng speaks as one share its time by their length.

    Args:
        text: the spoken text.
        events: word starts, in order of time.
        samples: [num_samples], what was spoken.
        sample_rate: of `samples`, in Hz.

    Returns:
        One entry per whitespace-separated word, in order, without overlaps, inside the samples.
    """
    written = text.split()
    starts = _start_times(text, events)
    known = [(index, start_sec) for index, start_sec in enumerate(starts) if start_sec is not None]
    total_sec = len(samples) / sample_rate
    words = []
    ends = [*known[1:], (len(written), total_sec)]
    for (index, start_sec), (following, limit_sec) in zip(known, ends, strict=True):
        end_sec = _end_of_sound(samples, start_sec, limit_sec, sample_rate=sample_rate)
        words += _share(written[index:following], start_sec, end_sec)
    return words


def _start_times(text: str, events: list[WordEvent]) -> list[float | None]:
    """Start of each written word in seconds, None where it has no event of its own."""
    first_chars = [match.start() for match in re.finditer(r"\S+", text)]
    times: list[list[float]] = [[] for _ in first_chars]
    for event in events:
        index = int(np.searchsorted(first_chars, event.char, side="right")) - 1
        times[max(index, 0)].append(event.start_sec)
    if not times[0]:
        times[0].append(0.0)
    _hand_on_spare_events(text.split(), times)
    starts = [min(own) if own else None for own in times]
    return _keep_increasing(starts)


def _hand_on_spare_events(written: list[str], times: list[list[float]]) -> None:
    """Move events to words that have none from the word before.

    A number has several events of its own. Any other word with two has the event of its successor:
    espeak-ng reports a wrong text position after words that it looks up together ("live in").
    """
    for index in range(1, len(times)):
        before = times[index - 1]
        if not times[index] and len(before) > 1 and not any(c.isdigit() for c in written[index - 1]):
            times[index] = before[1:]
            del before[1:]


def _keep_increasing(starts: list[float | None]) -> list[float | None]:
    """Drop starts that do not come after all earlier ones; their words share with the word before."""
    latest, kept = -1.0, []
    for start in starts:
        if start is not None and start <= latest:
            start = None
        kept.append(start)
        latest = latest if start is None else start
    return kept


def _end_of_sound(samples: np.ndarray, start_sec: float, limit_sec: float, *, sample_rate: int) -> float:
    part = samples[int(start_sec * sample_rate) : int(limit_sec * sample_rate)]
    loud = np.flatnonzero(np.abs(part) > _SILENCE)
    heard_sec = (loud[-1] + 1) / sample_rate if len(loud) else 0.0
    return min(limit_sec, start_sec + max(_MIN_WORD_SEC, heard_sec))


def _share(written: list[str], start_sec: float, end_sec: float) -> list[Word]:
    bounds = np.cumsum([0, *(len(word) for word in written)])
    times = start_sec + (end_sec - start_sec) * bounds / bounds[-1]
    return [Word(word, float(a), float(b)) for word, a, b in zip(written, times[:-1], times[1:], strict=True)]
