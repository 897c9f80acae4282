"""Transcription with word times, with the optional package whisper-timestamped.

It runs on a GPU and knows many languages; it needs no transcript.
"""

from types import ModuleType
from typing import Any

import numpy as np
import torch

from finetune.data.words import Word
from finetune.errors import ConfigError, DataError, UserError

SAMPLE_RATE = 16_000

# Whisper's own defaults; whisper-timestamped would decode greedily.
_DECODING = {"beam_size": 5, "best_of": 5, "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)}


class Whisper:
    """Transcribes one voice.

    Args:
        model: a name such as `medium`, or a folder or repository, as whisper-timestamped takes them.
        language: of the recordings, such as `en`; None finds it out per channel.
        device: `cuda`, `cuda:1` or `cpu`.
        instead: what else a user may do who has not installed it.

    Raises:
        UserError: whisper-timestamped is not installed, or the model cannot be loaded.
        ConfigError: there is no such device.
    """

    def __init__(
        self,
        *,
        model: str,
        language: str | None,
        device: str,
        instead: str = "use --engine pocketsphinx where there are transcripts",
    ) -> None:
        self._module = _import_whisper(instead)
        _check_device(device)
        self._language = language
        try:
            self._model: Any = self._module.load_model(model, device=device)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"--whisper-model: {model} cannot be loaded: {error}") from error

    def transcribe(self, samples: np.ndarray) -> list[Word]:
        """The words that are heard, in order.

        Speech is cut out by voice activity first: Whisper invents text in silence.

        Args:
            samples: [num_samples], float32 in -1..1 at 16 kHz.

        Raises:
            DataError: Whisper fails on this recording.
        """
        try:
            result = self._module.transcribe(
                self._model,
                samples,
                language=self._language,
                vad="auditok",
                condition_on_previous_text=False,
                verbose=None,
                **_DECODING,
            )
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            # What it raises at odd recordings; one of them must not end the others.
            raise DataError(f"whisper failed ({type(error).__name__}: {error}).") from error
        return [
            Word(word["text"].strip(), float(word["start"]), float(word["end"]))
            for segment in result["segments"]
            for word in segment.get("words", [])
            if word["text"].strip()
        ]


def _import_whisper(instead: str) -> ModuleType:
    try:
        import whisper_timestamped
    except ImportError as error:
        raise UserError(
            f"whisper_timestamped is not installed: pip install 'moshi-ttt[annotate-whisper]', or {instead}."
        ) from error
    return whisper_timestamped


def _check_device(device: str) -> None:
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        raise ConfigError(f"--device: {device!r} is not a device, such as cuda, cuda:1 or cpu.") from None
    if kind == "cuda" and index >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise ConfigError(f"--device: {device}: {seen} GPUs are seen; --device cpu does without, slowly.")
