"""Channels that do not fit their speakers are found where both talk at once, and only there."""

from pathlib import Path

import numpy as np
import pytest

from finetune.data.check.sound import check_swapped
from finetune.data.check.sound_levels import LevelMeter
from finetune.data.words import SPEAKERS, Word

RATE, SEC = 8000, 60


def dialogue(*, seed=0, noise=0.01, leak=0.0):
    """Two voices that each speak two thirds of the time, whatever the other does; samples and words."""
    random = np.random.default_rng(seed)
    samples = random.normal(0, noise, (2, RATE * SEC))
    words = []
    for channel, speaker in enumerate(SPEAKERS):
        time = 0.0
        while time < SEC - 2:
            time += random.uniform(0.1, 0.4)
            length = random.uniform(0.2, 0.8)
            part = slice(int(time * RATE), int((time + length) * RATE))
            samples[channel, part] += random.normal(0, 0.1, part.stop - part.start)
            words.append(Word("a", time, time + length, speaker))
            time += length
    return samples + leak * samples[::-1], words


def found(samples, words):
    meter = LevelMeter(2, RATE)
    meter.add(samples.astype(np.float32))
    return check_swapped(Path("a.wav"), meter.finish(), words)


@pytest.mark.parametrize("leak", [0.0, 0.2])
@pytest.mark.parametrize("speakers", [SPEAKERS, SPEAKERS[:1]])
def test_swapped_channels_are_found_where_both_sides_talk(leak, speakers):
    samples, words = dialogue(leak=leak)
    words = [word for word in words if word.speaker in speakers]
    assert found(samples, words) == []
    (finding,) = found(samples[::-1], words)
    assert finding.code == "swapped-channels"
    assert "words of SPEAKER_MAIN the right channel is" in finding.reason


def test_swapped_channels_are_found_by_onsets_alone():
    samples, words = dialogue(seed=1)
    words = [word._replace(end_sec=word.start_sec) for word in words]
    assert found(samples, words) == []
    assert len(found(samples[::-1], words)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_words_that_fit_no_channel_are_not_called_swapped(seed):
    samples, words = dialogue(seed=seed)
    _, others = dialogue(seed=seed + 100)
    assert found(samples, others) == []
    assert found(samples, words[:4]) == []
    assert found(np.zeros_like(samples), words) == []
