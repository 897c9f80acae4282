"""When a model speaks: from the sound of its recording, or from words with times."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from moshi.models.loaders import FRAME_RATE

from finetune.data.words import Word

FRAME_SEC = 1 / FRAME_RATE
THRESHOLD_DB = -45.0  # of a frame's RMS; speech of Moshi is about -20 dB, what it makes of silence below -60
HANGOVER_FRAMES = 6  # 0.48 s: the benchmark's v1.5 joins the model's speech over gaps of 0.5 s
MIN_FRAMES = 2  # a frame alone is a click


class Interval(NamedTuple):
    """A stretch of time, in seconds from the start of the recording."""

    start_sec: float
    end_sec: float

    @property
    def length_sec(self) -> float:
        """How long it is."""
        return self.end_sec - self.start_sec

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two have more than an instant in common."""
        return self.start_sec < other.end_sec and other.start_sec < self.end_sec


@dataclass(frozen=True)
class ModelSpeech:
    """What a model said, as far as the figures need it.

    Attributes:
        intervals: when it spoke, in order, none touching the next.
        words: what it said, in order; None: only its sound was looked at.
        duration_sec: of the whole recording.
    """

    intervals: tuple[Interval, ...]
    words: tuple[Word, ...] | None
    duration_sec: float

    def words_in(self, interval: Interval) -> tuple[Word, ...] | None:
        """The words of which a part lies in an interval; None where words are not known."""
        if self.words is None:
            return None
        return tuple(
            word
            for word in self.words
            if interval.overlaps(Interval(word.start_sec, max(word.end_sec, word.start_sec + 1e-9)))
        )

    def after(self, time_sec: float) -> "ModelSpeech":
        """Only what is said from a moment on: intervals are cut there, words that began earlier are gone."""
        intervals = tuple(
            Interval(max(start, time_sec), end) for start, end in self.intervals if end > time_sec
        )
        words = None
        if self.words is not None:
            words = tuple(word for word in self.words if word.start_sec >= time_sec)
        return ModelSpeech(intervals, words, self.duration_sec)


def join(intervals: Iterable[Interval], *, gap_sec: float) -> tuple[Interval, ...]:
    """Intervals sorted, and joined where a gap is no longer than `gap_sec` seconds."""
    joined: list[Interval] = []
    for interval in sorted(intervals):
        if joined and interval.start_sec - joined[-1].end_sec <= gap_sec + 1e-9:
            end_sec = max(joined[-1].end_sec, interval.end_sec)
            joined[-1] = Interval(joined[-1].start_sec, end_sec)
        else:
            joined.append(interval)
    return tuple(joined)


def loud_intervals(
    samples: np.ndarray,
    *,
    sample_rate: int,
    threshold_db: float = THRESHOLD_DB,
    hangover_frames: int = HANGOVER_FRAMES,
) -> tuple[Interval, ...]:
    """When a recording is loud, in whole frames of 80 ms.

    Frames whose RMS is above the threshold are joined over gaps of up to `hangover_frames`; what is then
    shorter than `MIN_FRAMES` is no speech.

    Args:
        samples: `[num_samples]`, full scale is 1.
        sample_rate: in Hz.
        threshold_db: in dB of full scale.
        hangover_frames: quiet frames inside speech.
    """
    size = round(sample_rate * FRAME_SEC)
    padded = np.pad(samples.astype(np.float64), (0, -len(samples) % size)).reshape(-1, size)
    loud = np.sqrt((padded**2).mean(1)) > 10 ** (threshold_db / 20)  # [num_frames]
    frames = [Interval(float(index), float(index + 1)) for index in np.flatnonzero(loud)]
    end_sec = len(samples) / sample_rate
    return tuple(
        Interval(start * FRAME_SEC, min(end * FRAME_SEC, end_sec))
        for start, end in join(frames, gap_sec=hangover_frames)
        if end - start >= MIN_FRAMES
    )


def speech_from_sound(
    samples: np.ndarray, *, sample_rate: int, threshold_db: float, hangover_frames: int
) -> ModelSpeech:
    """What a recording `[num_samples]` says of its speaker, see `loud_intervals`."""
    intervals = loud_intervals(
        samples, sample_rate=sample_rate, threshold_db=threshold_db, hangover_frames=hangover_frames
    )
    return ModelSpeech(intervals, None, len(samples) / sample_rate)


def speech_from_words(words: Sequence[Word], *, duration_sec: float, hangover_frames: int) -> ModelSpeech:
    """What words with times say of their speaker; they are joined over gaps of up to `hangover_frames`."""
    ordered = tuple(sorted(words, key=lambda word: word.start_sec))
    spans = [Interval(word.start_sec, max(word.start_sec, word.end_sec)) for word in ordered]
    return ModelSpeech(join(spans, gap_sec=hangover_frames * FRAME_SEC), ordered, duration_sec)
