"""Reading recordings, with every fault of a file reported instead of padded over."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import sphn

from finetune.errors import DataError

MAX_MISSING_SEC = 0.1
MAX_EXCESS_SEC = 1.0


@dataclass(frozen=True)
class AudioHeader:
    """What an audio file says about itself.

    Attributes:
        channels: How many it has.
        sample_rate: Samples per second.
        num_samples: Per channel.
    """

    channels: int
    sample_rate: int
    num_samples: int


def read_audio(path: Path, *, sample_rate: int, expected_duration_sec: float | None = None) -> np.ndarray:
    """Reads a stereo file at a given sample rate.

    Args:
        path: Audio file: left channel Moshi, right channel the user.
        sample_rate: Samples per second of the result; the file is resampled when it has another rate.
        expected_duration_sec: What the manifest says, in seconds; the file may be 0.1 s shorter or 1 s
            longer.

    Returns:
        float32 samples, ``[2, num_samples]``, with ``num_samples = round(n * sample_rate / file_rate)`` for a
        file of ``n`` samples per channel.

    Raises:
        DataError: The file is unreadable, truncated, empty or not stereo, holds NaN or infinite samples, or
            does not last as long as expected.
    """
    samples, file_rate = _decode(path, stereo=True)
    if expected_duration_sec is not None:
        check_duration(path, samples.shape[1] / file_rate, expected_duration_sec=expected_duration_sec)
    return _resample(path, samples, file_rate=file_rate, sample_rate=sample_rate)


def read_voice(path: Path, *, sample_rate: int) -> np.ndarray:
    """Reads the user's voice: the only channel of a mono file, the right one of a stereo file.

    Args:
        path: Audio file.
        sample_rate: Samples per second of the result; the file is resampled when it has another rate.

    Returns:
        float32 samples, ``[num_samples]``.

    Raises:
        DataError: The file is missing, unreadable, truncated or empty, or holds NaN or infinite samples.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    samples, file_rate = _decode(path)
    return _resample(path, samples[-1:], file_rate=file_rate, sample_rate=sample_rate)[0]


def check_duration(path: Path, duration_sec: float, *, expected_duration_sec: float) -> None:
    """Compares the length of a file with what a manifest says; see ``read_audio``.

    Raises:
        DataError: The file is more than 0.1 s shorter or more than 1 s longer.
    """
    difference_sec = duration_sec - expected_duration_sec
    if -MAX_MISSING_SEC <= difference_sec <= MAX_EXCESS_SEC:
        return
    relation = "shorter" if difference_sec < 0 else "longer"
    raise DataError(
        f"{path}: lasts {duration_sec:.2f} s, {relation} than the manifest's {expected_duration_sec:.2f} s; "
        "correct the manifest or the file.",
        code="duration",
    )


def open_audio(path: Path) -> tuple[sphn.FileReader, AudioHeader]:
    """Opens a file that is not Opus; raises DataError when it is missing, or no audio that can be read."""
    with readable(path):
        reader = sphn.FileReader(str(path))
        claimed = round(reader.duration_sec * reader.sample_rate)
        return reader, AudioHeader(reader.channels, reader.sample_rate, claimed)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever sphn raises into a DataError."""
    try:
        yield
    except BaseException as error:
        # sphn panics at some headers, and its panic is no Exception.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = str(error).removeprefix(f'"{path}": ')
        raise DataError(
            f"{path}: cannot be read as audio ({reason}); is it complete? Wav and flac files are fine."
        ) from error


def _decode(path: Path, *, stereo: bool = False) -> tuple[np.ndarray, int]:
    """Returns samples [channels, n] and the file's own rate, after checking header and values."""
    reader, header = open_audio(path)
    if stereo or header.channels > 2:
        _check_stereo(path, header.channels)
    with readable(path):
        samples = np.ascontiguousarray(reader.decode_all(), dtype=np.float32)
    check_length(path, samples.shape[1], header)
    check_finite(path, samples)
    return samples, header.sample_rate


def check_length(path: Path, num_samples: int, header: AudioHeader) -> None:
    """Raises DataError when a decoded file is empty or shorter than its header says."""
    # sphn returns what it finds before a premature end of the file and says nothing.
    if num_samples < header.num_samples:
        raise DataError(
            f"{path}: truncated, the header claims {header.num_samples} samples and the file holds "
            f"{num_samples}; copy or export it again.",
            code="truncated",
        )
    if num_samples == 0:
        raise DataError(
            f"{path}: holds no samples; remove it from the manifest or export it again.", code="empty"
        )


def check_finite(path: Path, samples: np.ndarray) -> None:
    """Raises DataError when a sample is NaN or infinite."""
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds NaN or infinite samples; export the audio again.", code="not-finite")


def _check_stereo(path: Path, channels: int) -> None:
    fix = "make it a stereo file with Moshi on the left and the user on the right."
    if channels == 1:
        raise DataError(f"{path}: mono, which trains 9 streams instead of 17; {fix}")
    if channels != 2:
        raise DataError(f"{path}: has {channels} channels, 2 are needed; {fix}")


def resampled_length(path: Path, num_samples: int, *, file_rate: int, sample_rate: int) -> int:
    """Returns how many samples a file has at another rate; raises DataError when it has none there."""
    resampled = round(num_samples * sample_rate / file_rate)
    if resampled == 0:
        raise DataError(
            f"{path}: too short, {num_samples} samples at {file_rate} Hz are none at {sample_rate} Hz; "
            "remove it or export it again.",
            code="empty",
        )
    return resampled


def _resample(path: Path, samples: np.ndarray, *, file_rate: int, sample_rate: int) -> np.ndarray:
    if file_rate == sample_rate:
        return samples
    num_samples = resampled_length(path, samples.shape[1], file_rate=file_rate, sample_rate=sample_rate)
    return fit_length(soxr.resample(samples.T, file_rate, sample_rate).T, num_samples)


def fit_length(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """Cuts or pads ``[channels, n]``: soxr rounds lengths in its own way and may be one sample off."""
    samples = samples[:, :num_samples]
    missing = num_samples - samples.shape[1]
    return np.ascontiguousarray(np.pad(samples, ((0, 0), (0, missing))), dtype=np.float32)
