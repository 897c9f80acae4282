"""The figures of one sample: functions of when the model spoke and of what the user did, nothing else.

What a takeover is, and the figures called the benchmark's, are those of Full-Duplex-Bench v1
(arXiv 2503.04721; github.com/DanielLin94144/Full-Duplex-Bench, `v1_v1.5/evaluation`).

A figure that a sample cannot have, such as the latency of an answer that never came, is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune.data.words import Word
from finetune.evaluation.duplex.speech import Interval, ModelSpeech

TURN_SEC = 1.0  # speech of this length is a turn
TURN_WORDS = 3  # and so are more words than these
LONG_TURN_SEC = 3.0  # speech longer than this is no backchannel, and ends the search for them
BACKCHANNEL_WORDS = 2  # a backchannel has at most these
WINDOW_SEC = 0.2  # of the distribution of backchannels
_EPSILON = 1e-10  # of a window without any

Values = dict[str, float | None]


@dataclass(frozen=True)
class Annotation:
    """What the user does in a sample.

    Attributes:
        events: pauses; the gap in which the turn changes; the interruption or other overlap. None of them
            where backchannels are measured.
        distribution: of people's backchannels over the sample, in windows of equal length; None: not known.
    """

    events: tuple[Interval, ...] = ()
    distribution: tuple[float, ...] | None = None


class Figure(NamedTuple):
    """What a figure means.

    Attributes:
        unit: of its mean over the samples.
        meaning: of the value of one sample.
    """

    unit: str
    meaning: str


FIGURES = {
    "takeover": Figure(
        "share of samples",
        f"1 where all the model says spans {TURN_SEC:g} s or more, or has more than {TURN_WORDS} words (not "
        "counted where speech is found by energy); of interruptions and other overlaps only what is said "
        f"after their end counts; of backchannels: 1 where a stretch of speech lasts {TURN_SEC:g} s or has "
        f"more than {BACKCHANNEL_WORDS} words. The benchmark's TOR",
    ),
    "speaks_in_pause": Figure(
        "share of samples",
        f"1 where the model speaks during a pause, in a stretch of {TURN_SEC:g} s or of more than "
        f"{TURN_WORDS} words, whenever that began",
    ),
    "latency_sec": Figure(
        "s, mean over takeovers",
        "from the end of the user's turn or interruption to the first speech that counts; 0 where the model "
        "spoke before. The benchmark's latency",
    ),
    "early": Figure("share of takeovers", "1 where the model began to speak before the user's turn ended"),
    "response_latency_sec": Figure(
        "s, mean over samples with such a start",
        "from the end of the interruption or overlap to the next moment at which the model begins to speak, "
        "as in v1.5 of the benchmark",
    ),
    "speaking_before": Figure(
        "share of samples", "1 where the model is speaking when the interruption or overlap begins"
    ),
    "stopped": Figure(
        "share of samples with speaking_before",
        "1 where that speech ends before the interruption or overlap does",
    ),
    "stop_latency_sec": Figure(
        "s, mean over samples with stopped",
        "from the start of the interruption or overlap to the end of that speech",
    ),
    "backchannels_per_sec": Figure(
        "1/s, mean over samples",
        f"stretches of speech of up to {LONG_TURN_SEC:g} s before the first longer one, over the length of "
        "the recording. The benchmark's frequency",
    ),
    "jsd": Figure(
        "0 to 1, mean over samples",
        "Jensen-Shannon distance (the square root of the divergence, natural logarithm) of their times, in "
        f"windows of {WINDOW_SEC:g} s, from those of people; 1 where there are none. The benchmark's JSD",
    ),
}


def is_turn(intervals: Sequence[Interval], words: Sequence[Word] | None) -> bool:
    """Whether speech is more than a backchannel: it spans a second, or has more than three words."""
    if not intervals:
        return False
    spans_turn = intervals[-1].end_sec - intervals[0].start_sec >= TURN_SEC - 1e-9
    return spans_turn or (words is not None and len(words) > TURN_WORDS)


def pause_figures(speech: ModelSpeech, annotation: Annotation) -> Values:
    """How a model takes the pauses inside a user's turn; all of the recording is that turn."""
    in_pause = any(
        interval.overlaps(pause) and is_turn([interval], speech.words_in(interval))
        for pause in annotation.events
        for interval in speech.intervals
    )
    return {
        "takeover": float(is_turn(speech.intervals, speech.words)),
        "speaks_in_pause": float(in_pause),
    }


def turn_figures(speech: ModelSpeech, annotation: Annotation) -> Values:
    """How a model takes the turn that a user gives it, at the start of the annotated gap."""
    turn_end_sec = annotation.events[0].start_sec
    if not is_turn(speech.intervals, speech.words):
        return {"takeover": 0.0, "latency_sec": None, "early": None}
    start_sec = speech.intervals[0].start_sec
    return {
        "takeover": 1.0,
        "latency_sec": max(0.0, start_sec - turn_end_sec),
        "early": float(start_sec < turn_end_sec),
    }


def overlap_figures(speech: ModelSpeech, annotation: Annotation) -> Values:
    """What a model does while and after somebody speaks, who may interrupt it or may not mean it at all."""
    event = annotation.events[0]
    after = speech.after(event.end_sec)
    takes_over = is_turn(after.intervals, after.words)
    starts = [start for start, _ in speech.intervals if start >= event.end_sec]
    spoken = next(
        (each for each in speech.intervals if each.start_sec < event.start_sec < each.end_sec), None
    )
    stopped = None if spoken is None else spoken.end_sec < event.end_sec
    return {
        "takeover": float(takes_over),
        "latency_sec": after.intervals[0].start_sec - event.end_sec if takes_over else None,
        "response_latency_sec": starts[0] - event.end_sec if starts else None,
        "speaking_before": float(spoken is not None),
        "stopped": None if stopped is None else float(stopped),
        "stop_latency_sec": spoken.end_sec - event.start_sec if spoken is not None and stopped else None,
    }


def backchannel_figures(speech: ModelSpeech, annotation: Annotation) -> Values:
    """How a model listens to somebody who speaks all the time."""
    takes_over, short = False, []
    for interval in speech.intervals:
        if interval.length_sec > LONG_TURN_SEC:
            takes_over = True
            break
        words = speech.words_in(interval)
        takes_over |= interval.length_sec >= TURN_SEC - 1e-9
        takes_over |= words is not None and len(words) > BACKCHANNEL_WORDS
        short.append(interval)
    distance = None
    if annotation.distribution is not None:
        distance = timing_distance(short, annotation.distribution, duration_sec=speech.duration_sec)
    return {
        "takeover": float(takes_over),
        "backchannels_per_sec": len(short) / speech.duration_sec,
        "jsd": distance,
    }


def timing_distance(
    intervals: Sequence[Interval], distribution: Sequence[float], *, duration_sec: float
) -> float:
    """The Jensen-Shannon distance between when somebody speaks and a given distribution; 1 without speech.

    Args:
        intervals: of the speech.
        distribution: in windows of equal length from start to end; it is interpolated to ours.
        duration_sec: of the recording.
    """
    if not intervals:
        return 1.0
    counts = np.zeros(int(duration_sec / WINDOW_SEC + 1e-9) + 1)
    for start, end in intervals:
        counts[int(start / WINDOW_SEC + 1e-9) : int(end / WINDOW_SEC + 1e-9) + 1] += 1
    ours = counts + _EPSILON
    theirs = np.interp(np.linspace(0, 1, len(ours)), np.linspace(0, 1, len(distribution)), distribution)
    ours, theirs = ours / ours.sum(), theirs / theirs.sum()
    middle = (ours + theirs) / 2
    divergence = (_relative_entropy(ours, middle) + _relative_entropy(theirs, middle)) / 2
    return float(np.sqrt(max(divergence, 0.0)))


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    """In nats; where p is 0 nothing is added."""
    positive = p > 0
    return float((p[positive] * np.log(p[positive] / q[positive])).sum())


class Task(NamedTuple):
    """A kind of sample.

    Attributes:
        title: what is measured, in a line.
        measure: the figures of a sample.
        aims: whether a lower or a higher figure is better, by its name; in the order of the table. None:
            neither is.
    """

    title: str
    measure: Callable[[ModelSpeech, Annotation], Values]
    aims: Mapping[str, str | None]


_FLOOR = {"takeover": None, "latency_sec": None, "response_latency_sec": None}
_OVERLAP = Task(
    "keeping the floor while somebody else speaks, or speaks without meaning the model",
    overlap_figures,
    {**_FLOOR, "speaking_before": None, "stopped": "lower", "stop_latency_sec": None},
)
TASKS = {
    "pause_handling": Task(
        "waiting in pauses", pause_figures, {"takeover": "lower", "speaks_in_pause": "lower"}
    ),
    "smooth_turn_taking": Task(
        "taking the turn",
        turn_figures,
        {"takeover": "higher", "latency_sec": "lower", "early": "lower"},
    ),
    "user_interruption": Task(
        "being interrupted",
        overlap_figures,
        {
            "takeover": "higher",
            "latency_sec": "lower",
            "response_latency_sec": "lower",
            "speaking_before": None,
            "stopped": "higher",
            "stop_latency_sec": "lower",
        },
    ),
    "backchannel": Task(
        "listening with backchannels",
        backchannel_figures,
        {"takeover": "lower", "backchannels_per_sec": "higher", "jsd": "lower"},
    ),
    "user_backchannel": _OVERLAP,
    "talking_to_other": _OVERLAP,
    "background_speech": _OVERLAP,
}
