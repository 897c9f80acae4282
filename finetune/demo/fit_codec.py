"""The demo's codec: a tiny Mimi that is fitted on recordings, and measured on them.

T frames, N frames with speech, D latent dimensions.
"""

import json
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from moshi.models.compression import MimiModel
from torch import Tensor

from finetune.demo.codebooks import CodebookUse, count_codebook_use, fit_codebooks
from finetune.demo.speech.dialogues import MAIN, USER
from finetune.demo.speech.word_times import SAMPLE_RATE
from finetune.demo.tiny_mimi import encode_latents, make_tiny_mimi

_FRAME_SAMPLES = 1920
_USED_SEC = 60.0  # of each recording; more audio changes the codebooks little
_SETUP_SEC = 30.0  # of speech, to set up the encoder
_ENOUGH_FRAMES = 2048  # to fit codebooks of 64 entries that do not memorise single frames
_MAX_SHIFTS = 8


def fit_codec(wav_paths: Sequence[Path], *, seed: int) -> MimiModel:
    """Make a Mimi with codebooks fitted on the speech of both channels of some recordings.

    Raises:
        UserError: the recordings contain too little speech.
    """
    mimi = make_tiny_mimi(_gather_speech(wav_paths), seed=seed)
    fit_codebooks(mimi, _gather_latents(mimi, wav_paths), seed=seed)
    return mimi


def measure_codec(mimi: MimiModel, wav_paths: Sequence[Path]) -> list[CodebookUse]:
    """The use of each codebook on the frames of each channel in which its speaker speaks."""
    codes = []
    for audio, mask in _read_all(wav_paths):
        with torch.no_grad():
            codes.append(mimi.encode(audio[:, None]).transpose(1, 2)[mask])
    return count_codebook_use(torch.cat(codes).T, num_bins=mimi.cardinality)


def read_recording(wav_path: Path, *, max_sec: float, skip_samples: int = 0) -> tuple[Tensor, Tensor]:
    """Read the start of a recording of the demo.

    Args:
        wav_path: the recording, its word timings beside it.
        max_sec: where to stop.
        skip_samples: where to begin, and with it the first frame.

    Returns:
        Audio [2, num_samples], float32 in -1..1, and a mask [2, T], true where the middle of a frame lies
        in a word of the channel's speaker.
    """
    with wave.open(str(wav_path), "rb") as file:
        data = file.readframes(min(file.getnframes(), round(max_sec * SAMPLE_RATE)))
    samples = np.frombuffer(data, dtype="<i2").reshape(-1, 2)[skip_samples:].T
    audio = torch.from_numpy(samples.astype(np.float32) / 32768.0)
    frames = np.arange(-(-audio.shape[1] // _FRAME_SAMPLES))
    middles_sec = ((frames + 0.5) * _FRAME_SAMPLES + skip_samples) / SAMPLE_RATE
    mask = np.zeros((2, len(middles_sec)), dtype=bool)
    for _, (start_sec, end_sec), speaker in json.loads(wav_path.with_suffix(".json").read_text())[
        "alignments"
    ]:
        mask[(MAIN, USER).index(speaker)] |= (start_sec <= middles_sec) & (middles_sec < end_sec)
    return audio, torch.from_numpy(mask)


def _read_all(wav_paths: Sequence[Path], *, skip_samples: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    return (read_recording(path, max_sec=_USED_SEC, skip_samples=skip_samples) for path in wav_paths)


def _gather_latents(mimi: MimiModel, wav_paths: Sequence[Path]) -> Tensor:
    """[N, D] of speech. Short recordings are read again with shifted frames until they suffice."""
    latents: list[Tensor] = []
    for shift in range(_MAX_SHIFTS):
        skip_samples = shift * _FRAME_SAMPLES // _MAX_SHIFTS
        for audio, mask in _read_all(wav_paths, skip_samples=skip_samples):
            latents.append(encode_latents(mimi, audio)[mask])
        if sum(map(len, latents)) >= _ENOUGH_FRAMES:
            break
    return torch.cat(latents)


def _gather_speech(wav_paths: Sequence[Path]) -> Tensor:
    """[num_samples] of speech without the silence between turns, both channels after each other."""
    parts, missing = [], round(_SETUP_SEC * SAMPLE_RATE)
    for audio, mask in _read_all(wav_paths):
        loud = mask.repeat_interleave(_FRAME_SAMPLES, dim=1)[:, : audio.shape[1]]
        parts.append(audio[loud][:missing])
        missing -= len(parts[-1])
        if missing <= 0:
            break
    return torch.cat(parts)
