"""Writing wav files piece by piece: 16-bit PCM, of which 16-bit sources come out as they went in."""

import wave
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from finetune.errors import DataError
from moshi_ttt.files.atomic_file import replacing

_SCALE = 2**15
_MAX_BYTES = 2**32 - 2**16  # what the header of a wav file can say


def write_wav(path: Path, pieces: Iterable[np.ndarray], *, channels: int, sample_rate: int) -> int:
    """Write a wav file whole or not at all.

    Args:
        path: of the file; an older one is replaced.
        pieces: float samples [channels, n], 1 being full scale; what is beyond is clipped.
        channels: how many.
        sample_rate: in Hz.

    Returns:
        The number of samples per channel.

    Raises:
        DataError: it would be larger than a wav file can be, or the pieces cannot be read.
        OSError: it cannot be written; an older file is intact.
    """
    num_samples = 0
    with replacing(path) as partial, open(partial, "wb") as file, wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        for piece in pieces:
            num_samples += piece.shape[1]
            if 2 * channels * num_samples > _MAX_BYTES:
                raise DataError("is longer than a wav file can be, 4 GiB; cut it into parts.")
            pcm = np.clip(np.round(piece.T * _SCALE), -_SCALE, _SCALE - 1).astype("<i2")
            out.writeframesraw(pcm.tobytes())
    return num_samples


def cut_out(pieces: Iterable[np.ndarray], *, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """The samples of some pieces from `start` on, up to `stop` where there is one."""
    position = 0
    for piece in pieces:
        end = position + piece.shape[1]
        part = piece[:, max(start - position, 0) : None if stop is None else max(stop - position, 0)]
        if part.shape[1]:
            yield part
        position = end
        if stop is not None and position >= stop:
            return
