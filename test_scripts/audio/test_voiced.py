"""Where an utterance is voiced, and word times that are estimated from it."""

import numpy as np
import pytest

from finetune.data.audio.voiced import estimate_words, find_voice, trim
from finetune.errors import DataError

RATE = 11_025  # no whole number of samples in 10 ms


def tones(stretches: list[tuple[float, float]], total_sec: float, *, noise: float = 0.0) -> np.ndarray:
    """A tone in each stretch, over noise of this standard deviation: [num_samples]."""
    time = np.arange(round(total_sec * RATE)) / RATE
    on = sum((time >= start) & (time < end) for start, end in stretches)
    return 0.3 * on * np.sin(2 * np.pi * 300 * time) + np.random.default_rng(0).normal(0, noise, len(time))


@pytest.mark.parametrize("noise", [0.0, 1e-4, 3e-3])
def test_voice_is_found_above_whatever_noise_there_is(noise):
    found = find_voice(tones([(0.5, 1.0), (9.3, 9.9)], 11.0, noise=noise), sample_rate=RATE)
    np.testing.assert_allclose(found, [(0.5, 1.0), (9.3, 9.9)], atol=0.03)


def test_a_short_gap_is_part_of_a_word():
    found = find_voice(tones([(0.5, 0.8), (0.86, 1.2)], 2.0), sample_rate=RATE)
    np.testing.assert_allclose(found, [(0.5, 1.2)], atol=0.03)


def test_voice_without_any_silence_is_voice_throughout():
    found = find_voice(tones([(0.0, 1.0)], 1.0), sample_rate=RATE)
    np.testing.assert_allclose(found, [(0.0, 1.0)], atol=0.03)


@pytest.mark.parametrize(
    ("samples", "message"), [(np.zeros(RATE), "is silent"), (np.ones(50), "is too short")]
)
def test_where_nothing_is_heard_that_is_said(samples, message):
    with pytest.raises(DataError, match=message):
        find_voice(samples, sample_rate=RATE)


@pytest.mark.parametrize("start_sec", [0.0, 0.5])
def test_trimming_keeps_the_voice_and_moves_its_times(start_sec):
    samples = tones([(start_sec, start_sec + 0.4)], 2.0)
    trimmed, voice = trim(samples, find_voice(samples, sample_rate=RATE), sample_rate=RATE)
    assert len(trimmed) / RATE == pytest.approx(0.4 + 0.05 + min(start_sec, 0.05), abs=0.05)
    np.testing.assert_allclose(find_voice(trimmed, sample_rate=RATE), voice, atol=0.011)


def test_words_share_the_voice_by_their_letters_and_the_ends_of_phrases_get_more():
    words = estimate_words("Aaa, bbb - ccc!", np.array([[1.0, 2.95]]))  # (3 + 2) times 1.3, 1 and 1.6
    spans = [(1.0, 1.65), (1.65, 2.15), (2.15, 2.95)]
    assert [word.text for word in words] == ["Aaa,", "bbb", "ccc!"]
    np.testing.assert_allclose([word[1:3] for word in words], spans, atol=1e-9)


def test_a_word_ends_before_a_pause_and_the_next_begins_after_it():
    words = estimate_words("aaa bbb ccc", np.array([[0.0, 0.5], [1.0, 1.5], [3.0, 3.8]]))
    spans = [(0.0, 0.5), (1.0, 1.5), (3.0, 3.8)]
    np.testing.assert_allclose([word[1:3] for word in words], spans, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [("... - !", "has no words"), ("twenty-one letters and one", "transcript is too long for the recording")],
)
def test_a_text_that_cannot_have_been_said_gets_no_times(text, message):
    with pytest.raises(DataError, match=message):
        estimate_words(text, np.array([[0.0, 0.5], [0.6, 1.1]]))
