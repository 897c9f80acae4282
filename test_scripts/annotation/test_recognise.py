"""Hearing words without a transcript."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import soxr

from finetune.annotation.recognise import SAMPLE_RATE, make_recogniser
from finetune.annotation.whisper import Whisper
from finetune.demo.speech.espeak import Espeak, EspeakVoice
from finetune.errors import UserError

TEXT = "the train to london leaves at seven in the morning"


def test_pocketsphinx_hears_most_words_of_a_clear_voice_where_they_are():
    espeak = Espeak()
    samples, _ = espeak.say(TEXT, EspeakVoice("en-us", 150, 42))
    samples = soxr.resample(samples, espeak.sample_rate, SAMPLE_RATE)
    quiet = np.zeros(SAMPLE_RATE // 2, np.float32)
    recogniser = make_recogniser("pocketsphinx", whisper_model="")
    found = recogniser.transcribe(np.concatenate([quiet, samples, quiet]))
    assert len(set(TEXT.split()) & {word.text for word in found}) >= 5, found
    assert found[0].start_sec == pytest.approx(0.5, abs=0.3)
    assert found[-1].end_sec == pytest.approx(0.5 + len(samples) / SAMPLE_RATE, abs=0.4)
    assert all(first.end_sec <= second.start_sec + 0.02 for first, second in pairwise(found))
    assert recogniser.transcribe(quiet) == []


def test_whisper_runs_on_a_gpu_where_there_is_one_or_as_told(monkeypatch):
    made = []
    monkeypatch.setattr(Whisper, "__init__", lambda _, **settings: made.append(settings))
    make_recogniser("whisper", whisper_model="tiny", device="cpu")
    assert [(each["model"], each["language"], each["device"]) for each in made] == [("tiny", "en", "cpu")]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(UserError, match="pocketsphinx is not installed"):
        make_recogniser("pocketsphinx", whisper_model="")
    monkeypatch.setitem(sys.modules, "whisper_timestamped", None)
    with pytest.raises(UserError, match=r"annotate-whisper\]', or use pocketsphinx\.$"):
        make_recogniser("whisper", whisper_model="tiny", device="cpu")
