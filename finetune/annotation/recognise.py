"""Hearing words without a transcript: PocketSphinx with its own English language model, or Whisper."""

from typing import Any, Protocol

import numpy as np
import torch

from finetune.annotation.aligner import SAMPLE_RATE, make_decoder, to_pcm
from finetune.annotation.whisper import Whisper
from finetune.data.words import Word

__all__ = ["RECOGNISERS", "SAMPLE_RATE", "Recogniser", "make_recogniser"]

RECOGNISERS = ("pocketsphinx", "whisper")
_FRAME_SEC = 0.01
_PAD_SEC = 0.3  # what `to_pcm` puts before the sound


class Recogniser(Protocol):
    """Hears words in one voice."""

    def transcribe(self, samples: np.ndarray) -> list[Word]:
        """The words in samples [num_samples] at 16 kHz, in order; raises DataError where that fails."""


class _PocketSphinx:
    def __init__(self) -> None:
        self._decoder: Any = make_decoder()

    def transcribe(self, samples: np.ndarray) -> list[Word]:
        decoder = self._decoder
        decoder.start_utt()
        decoder.process_raw(to_pcm(samples), full_utt=True)
        decoder.end_utt()
        end_sec = len(samples) / SAMPLE_RATE
        words = []
        for segment in decoder.seg() or ():
            if segment.word.startswith(("<", "[")):  # silence and noise
                continue
            times = (segment.start_frame * _FRAME_SEC, (segment.end_frame + 1) * _FRAME_SEC)
            start, end = (min(max(time - _PAD_SEC, 0.0), end_sec) for time in times)
            words.append(Word(segment.word.partition("(")[0], start, end))  # "the(2)" is a pronunciation
        return words


def make_recogniser(name: str, *, whisper_model: str, device: str | None = None) -> Recogniser:
    """What hears words.

    Args:
        name: one of `RECOGNISERS`.
        whisper_model: of Whisper, see `Whisper`.
        device: of Whisper; None: a GPU where there is one.

    Raises:
        UserError: its package is not installed, or its model cannot be loaded.
    """
    if name == "pocketsphinx":
        return _PocketSphinx()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Whisper(model=whisper_model, language="en", device=device, instead="use pocketsphinx")
