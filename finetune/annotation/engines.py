"""What an engine is asked and what it answers: words of one channel, with or without a transcript."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from finetune.annotation.aligner import MIN_LOCAL_SCORE, MIN_SCORE, Aligner
from finetune.annotation.aligner import SAMPLE_RATE as ALIGNER_RATE
from finetune.annotation.whisper import SAMPLE_RATE as WHISPER_RATE
from finetune.annotation.whisper import Whisper
from finetune.data.words import Word

ENGINES = ("whisper", "pocketsphinx")


class Engine(Protocol):
    """Finds words in one voice.

    Attributes:
        sample_rate: of the samples that it takes, in Hz.
        needs_transcript: whether `words` is given what is said.
    """

    sample_rate: int
    needs_transcript: bool

    def words(self, samples: np.ndarray, transcript: str) -> list[Word]:
        """The words in samples [num_samples]; raises DataError where that fails."""


@dataclass(frozen=True)
class EngineSettings:
    """How to make an engine, in whichever process.

    Attributes:
        name: one of `ENGINES`.
        whisper_model: name of the model.
        language: for Whisper, None finds it out.
        device: for Whisper; `cuda` means a GPU per worker, in turn.
        min_score: see `Aligner`.
        min_local_score: see `Aligner`.
    """

    name: str
    whisper_model: str = "medium"
    language: str | None = "en"
    device: str = "cuda"
    min_score: float = MIN_SCORE
    min_local_score: float = MIN_LOCAL_SCORE

    def build(self, worker: int = 0) -> Engine:
        """Make the engine of a worker, counted from 0; raises UserError where a package is missing."""
        if self.name == "pocketsphinx":
            return _PocketSphinxEngine(
                Aligner(min_score=self.min_score, min_local_score=self.min_local_score)
            )
        device = self.device
        if device == "cuda" and torch.cuda.device_count() > 1:
            device = f"cuda:{worker % torch.cuda.device_count()}"
        return _WhisperEngine(Whisper(model=self.whisper_model, language=self.language, device=device))


class _PocketSphinxEngine:
    sample_rate = ALIGNER_RATE
    needs_transcript = True

    def __init__(self, aligner: Aligner) -> None:
        self._aligner = aligner

    def words(self, samples: np.ndarray, transcript: str) -> list[Word]:
        return self._aligner.align(samples, transcript).words


class _WhisperEngine:
    sample_rate = WHISPER_RATE
    needs_transcript = False

    def __init__(self, whisper: Whisper) -> None:
        self._whisper = whisper

    def words(self, samples: np.ndarray, transcript: str) -> list[Word]:
        return self._whisper.transcribe(samples)
