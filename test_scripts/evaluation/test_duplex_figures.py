"""The figures of evaluate.py duplex: functions of when model and user speak, known by construction."""

import math

import numpy as np
import pytest

from finetune.data.words import Word
from finetune.evaluation.duplex.figures import FIGURES, TASKS, Annotation, timing_distance
from finetune.evaluation.duplex.speech import (
    FRAME_SEC,
    HANGOVER_FRAMES,
    Interval,
    ModelSpeech,
    loud_intervals,
    speech_from_words,
)
from finetune.evaluation.duplex.talk import WordTimes
from miniatures.duplex import (
    ANSWERS,
    INTERRUPTION,
    INTERRUPTS,
    PAUSE,
    RATE,
    SECONDS,
    TURN_END,
    WAITS,
    voice,
)

SETS = {
    "candor_pause_handling": ("pause_handling", PAUSE),
    "candor_turn_taking": ("smooth_turn_taking", (TURN_END, TURN_END + 0.4)),
    "synthetic_user_interruption": ("user_interruption", INTERRUPTION),
    "icc_backchannel": ("backchannel", None),
}
UNIFORM = (1.0,) * 61


def speaking(*intervals, words=None) -> ModelSpeech:
    return ModelSpeech(tuple(Interval(*each) for each in intervals), words, SECONDS)


def figures(name: str, spoken) -> dict:
    """Of a set of the miniature benchmark."""
    task, event = SETS[name]
    events = () if event is None else (Interval(*event),)
    distribution = UNIFORM if event is None else None
    return TASKS[task].measure(speaking(*spoken[name]), Annotation(events, distribution))


def test_a_model_that_always_waits_takes_no_turn_at_all():
    assert figures("candor_pause_handling", WAITS) == {"takeover": 0, "speaks_in_pause": 0}
    assert figures("candor_turn_taking", WAITS) == {"takeover": 0, "latency_sec": None, "early": None}
    assert figures("synthetic_user_interruption", WAITS) == {
        "takeover": 0,
        "latency_sec": None,
        "response_latency_sec": None,
        "speaking_before": 0,
        "stopped": None,
        "stop_latency_sec": None,
    }
    assert figures("icc_backchannel", WAITS) == {"takeover": 0, "backchannels_per_sec": 0, "jsd": 1}


def test_a_model_that_always_interrupts_takes_every_turn_without_latency_and_never_stops():
    assert figures("candor_pause_handling", INTERRUPTS) == {"takeover": 1, "speaks_in_pause": 1}
    assert figures("candor_turn_taking", INTERRUPTS) == {"takeover": 1, "latency_sec": 0, "early": 1}
    assert figures("synthetic_user_interruption", INTERRUPTS) == {
        "takeover": 1,
        "latency_sec": 0,
        "response_latency_sec": None,
        "speaking_before": 1,
        "stopped": 0,
        "stop_latency_sec": None,
    }
    assert figures("icc_backchannel", INTERRUPTS) == {"takeover": 1, "backchannels_per_sec": 0, "jsd": 1}


def test_a_model_that_answers_after_half_a_second_has_that_latency():
    assert figures("candor_pause_handling", ANSWERS) == {"takeover": 0, "speaks_in_pause": 0}
    assert figures("candor_turn_taking", ANSWERS) == {"takeover": 1, "latency_sec": 0.5, "early": 0}
    assert figures("synthetic_user_interruption", ANSWERS) == {
        "takeover": 1,
        "latency_sec": 0.5,
        "response_latency_sec": 0.5,
        "speaking_before": 1,
        "stopped": 1,
        "stop_latency_sec": 0.5,
    }
    found = figures("icc_backchannel", ANSWERS)
    assert found["takeover"] == 0 and found["backchannels_per_sec"] == pytest.approx(2 / SECONDS)
    assert 0 < found["jsd"] < math.sqrt(math.log(2))


def test_every_figure_is_defined_and_every_task_names_those_that_it_gives():
    event = Annotation((Interval(1.0, 2.0),), UNIFORM)
    for task in TASKS.values():
        assert set(task.measure(speaking(), event)) == set(task.aims) <= set(FIGURES)


@pytest.mark.parametrize(
    ("end", "num_words", "expected"), [(1.9, None, 0), (2.0, None, 1), (1.9, 3, 0), (1.9, 4, 1), (2.0, 1, 1)]
)
def test_a_turn_is_a_second_of_speech_or_more_than_three_words(end, num_words, expected):
    words = (
        None if num_words is None else tuple(Word("a", 1 + k / 10, 1.1 + k / 10) for k in range(num_words))
    )
    event = Annotation((Interval(0.5, 3.0),))
    found = TASKS["pause_handling"].measure(speaking((1.0, end), words=words), event)
    assert found == {"takeover": expected, "speaks_in_pause": expected}


def test_only_what_is_said_after_an_interruption_is_an_answer_to_it():
    event = Annotation((Interval(4.0, 6.0),))
    goes_on = TASKS["user_interruption"].measure(speaking((1.0, 6.5)), event)
    assert (goes_on["takeover"], goes_on["stopped"], goes_on["latency_sec"]) == (0, 0, None)
    words = tuple(Word("a", 5.8 + k / 10, 5.9 + k / 10) for k in range(6))  # two before the end, four after
    assert TASKS["user_interruption"].measure(speaking((5.8, 6.4), words=words), event)["takeover"] == 1
    assert TASKS["user_interruption"].measure(speaking((5.8, 6.4), words=words[:5]), event)["takeover"] == 0


def test_speech_outside_a_pause_is_not_speech_in_it():
    event = Annotation((Interval(4.0, 5.0), Interval(8.0, 9.0)))
    before = TASKS["pause_handling"].measure(speaking((1.0, 4.0), (5.0, 7.0)), event)
    assert before == {"takeover": 1, "speaks_in_pause": 0}
    assert TASKS["pause_handling"].measure(speaking((8.9, 10.0)), event)["speaks_in_pause"] == 1
    assert TASKS["pause_handling"].measure(speaking((8.2, 8.6)), event)["speaks_in_pause"] == 0


def test_a_backchannel_is_short_and_the_first_long_speech_ends_the_search():
    measure = TASKS["backchannel"].measure
    known = {"takeover": 1, "jsd": None}
    assert measure(speaking((1.0, 1.5), (3.0, 6.5), (8.0, 8.5)), Annotation()) == known | {
        "backchannels_per_sec": 1 / SECONDS
    }
    assert measure(speaking((1.0, 2.5)), Annotation())["takeover"] == 1
    three = tuple(Word("m", 1 + k / 10, 1.1 + k / 10) for k in range(3))
    assert measure(speaking((1.0, 1.5), words=three), Annotation())["takeover"] == 1
    assert measure(speaking((1.0, 1.5), words=three[:2]), Annotation())["takeover"] == 0


def test_the_distance_of_times_is_0_for_the_same_ones_and_the_root_of_ln_2_for_disjoint_ones():
    # 2 s are 11 windows of 0.2 s; a stretch of speech counts in those of its start and its end.
    spoken = [Interval(0.4, 0.6)]
    alike = [0.0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert timing_distance(spoken, alike, duration_sec=2.0) == pytest.approx(0, abs=1e-4)
    disjoint = [0.0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    assert timing_distance(spoken, disjoint, duration_sec=2.0) == pytest.approx(
        math.sqrt(math.log(2)), abs=1e-4
    )
    half = [0.0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # 1/2 [ln(4/3)] + 1/4 [ln(2/3) + ln 2]
    expected = 0.5 * (math.log(4 / 3)) + 0.25 * (math.log(2 / 3) + math.log(2))
    assert timing_distance(spoken, half, duration_sec=2.0) == pytest.approx(math.sqrt(expected), abs=1e-4)
    assert timing_distance([], alike, duration_sec=2.0) == 1


def test_speech_is_found_by_energy_to_a_frame():
    spoken = [(1.0, 2.13), (3.2, 5.0)]
    found = loud_intervals(voice(spoken, seconds=6.0), sample_rate=RATE)
    assert len(found) == 2
    for ours, (start, end) in zip(found, spoken, strict=True):
        assert start - FRAME_SEC < ours.start_sec <= start
        assert end <= ours.end_sec < end + FRAME_SEC
    assert loud_intervals(voice([], seconds=6.0), sample_rate=RATE) == ()
    assert loud_intervals(np.zeros(100, np.float32), sample_rate=RATE) == ()
    assert loud_intervals(voice(spoken, seconds=6.0), sample_rate=RATE, threshold_db=-10.0) == ()


def test_short_silences_are_part_of_the_speech_and_a_click_is_none():
    gap = HANGOVER_FRAMES * FRAME_SEC
    ends = 1.2 + np.array([0, gap, gap + FRAME_SEC])
    joined, apart = (
        loud_intervals(voice([(0.8, 1.2), (start, start + 0.4)], seconds=4.0), sample_rate=RATE)
        for start in ends[1:]
    )
    assert (len(joined), len(apart)) == (1, 2)
    assert loud_intervals(voice([(1.61, 1.67)], seconds=4.0), sample_rate=RATE) == ()


def test_words_are_joined_to_speech_over_short_gaps():
    words = [Word("b", 1.5, 1.8), Word("a", 1.0, 1.2), Word("c", 4.0, 4.0)]
    found = speech_from_words(words, duration_sec=6.0, hangover_frames=6)
    assert found.intervals == (Interval(1.0, 1.8), Interval(4.0, 4.0))
    assert [word.text for word in found.words] == ["a", "b", "c"]


class Pieces:
    """Stands in the place of a decoder: tokens are indices of texts."""

    texts = ("", " hel", "lo", " you", "", "\ufffd")

    def add(self, token):
        return self.texts[token]

    def finish(self):
        return "!"


def test_words_of_the_text_stream_last_from_their_first_token_to_their_last():
    times = WordTimes(Pieces())
    for frame, token in enumerate([0, 1, 0, 2, 0, 3]):
        times.add(token, frame)
    words = [(word.text, round(word.start_sec, 2), round(word.end_sec, 2)) for word in times.finish()]
    assert words == [("hello", 0.08, 0.32), ("you!", 0.4, 0.48)]
