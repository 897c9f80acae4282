"""Checks of audio files: every fault is reported instead of padded over."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sphn

from finetune.errors import DataError

MAX_MISSING_SEC = 0.1
MAX_EXCESS_SEC = 1.0


@dataclass(frozen=True)
class AudioHeader:
    """What an audio file says about itself.

    Attributes:
        channels: how many it has.
        sample_rate: samples per second.
        num_samples: per channel.
    """

    channels: int
    sample_rate: int
    num_samples: int


def check_duration(path: Path, duration_sec: float, *, expected_duration_sec: float) -> None:
    """Compare the length of a file with what a manifest says.

    Raises:
        DataError: the file is more than 0.1 s shorter or more than 1 s longer.
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


def check_frames(path: Path, num_frames: int, *, frame_rate: float, expected_duration_sec: float) -> None:
    """Compare the number of codes of a file with what a manifest says, as `check_duration` does.

    The last frame may be filled up, so a length is known to a frame only.
    """
    shortest, longest = ((num_frames - rest) / frame_rate for rest in (1, 0))
    duration_sec = min(max(expected_duration_sec, shortest), longest)
    check_duration(path, duration_sec, expected_duration_sec=expected_duration_sec)


def open_audio(path: Path) -> tuple[sphn.FileReader, AudioHeader]:
    """Open a file that is not Opus; raises DataError when it is missing, or no audio that can be read."""
    with readable(path):
        reader = sphn.FileReader(str(path))
        claimed = round(reader.duration_sec * reader.sample_rate)
        return reader, AudioHeader(reader.channels, reader.sample_rate, claimed)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever sphn raises into a DataError."""
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


def truncated_error(path: Path, *, claimed: int, held: int) -> DataError:
    """What to raise for a file that holds fewer samples than its header claims."""
    return DataError(
        f"{path}: truncated, the header claims {claimed} samples and the file holds {held}; copy or export "
        "it again.",
        code="truncated",
    )


def contradiction(path: Path, header: AudioHeader, held: int) -> DataError:
    """What to raise for a file that holds more samples than its header claims."""
    claimed_sec, held_sec = (num / header.sample_rate for num in (header.num_samples, held))
    return DataError(
        f"{path}: the header claims {claimed_sec:.2f} s and the file holds {held_sec:.2f} s or more; export "
        "it again.",
        code="contradiction",
    )


def check_length(path: Path, num_samples: int, header: AudioHeader) -> None:
    """Raise DataError when a decoded file is empty or shorter than its header says."""
    # sphn returns what it finds before a premature end of the file and says nothing.
    if num_samples < header.num_samples:
        raise truncated_error(path, claimed=header.num_samples, held=num_samples)
    if num_samples == 0:
        raise DataError(
            f"{path}: holds no samples; remove it from the manifest or export it again.", code="empty"
        )


def check_finite_samples(path: Path, samples: np.ndarray) -> None:
    """Raise DataError when a sample is NaN or infinite."""
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds NaN or infinite samples; export the audio again.", code="not-finite")


def resampled_length(path: Path, num_samples: int, *, file_rate: int, sample_rate: int) -> int:
    """How many samples a file has at another rate; raises DataError when it has none there."""
    resampled = round(num_samples * sample_rate / file_rate)
    if resampled == 0:
        raise DataError(
            f"{path}: too short, {num_samples} samples at {file_rate} Hz are none at {sample_rate} Hz; "
            "remove it or export it again.",
            code="empty",
        )
    return resampled


def fit_length(samples: np.ndarray, num_samples: int) -> np.ndarray:
    """Cut or pad `[channels, n]`: soxr rounds lengths in its own way and may be one sample off."""
    samples = samples[:, :num_samples]
    missing = num_samples - samples.shape[1]
    return np.ascontiguousarray(np.pad(samples, ((0, 0), (0, missing))), dtype=np.float32)
