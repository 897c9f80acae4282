"""Reading mono and stereo recordings of hours, wav and flac files in blocks of bounded memory.

All others are decoded as a whole, since a lossy stream that is entered in the middle decodes to other
samples: that takes 8 bytes per sample and channel, 2.8 GB for an hour of stereo at 48 kHz. No more than a
header claims is decoded.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import soxr
import sphn

from finetune.data.audio.checks import (
    MAX_EXCESS_SEC,
    AudioHeader,
    check_duration,
    check_finite_samples,
    check_length,
    contradiction,
    fit_length,
    open_audio,
    readable,
    resampled_length,
)
from finetune.data.audio.opus import check_opus_length, read_opus_header
from finetune.data.audio.wav import open_wav, read_wav
from finetune.errors import DataError

BLOCK_SEC = 60
OVERLAP_SEC = 1
# What sphn makes of other rates are allocations of terabytes and empty pieces.
SAMPLE_RATES = (1000, 768_000)
# Of what compresses best: silence.
LEAST_BYTES_PER_SEC = 25
# What a process may take for a recording before it is ended: some hundred times what decoding takes.
LIMIT_SEC, LIMIT_BYTES_PER_SEC = 120, 100_000


def read_audio_header(path: Path) -> AudioHeader:
    """Read how many channels and samples a file claims, without decoding it.

    Raises:
        DataError: the file is missing or no audio that can be read, or has more than two channels or a sample
            rate that no recording has.
    """
    header = _read_header(path, audio_kind(path))
    _check_rate(path, header.sample_rate)
    if header.channels not in (1, 2):
        raise DataError(f"{path}: has {header.channels} channels; make it mono or stereo.", code="channels")
    return header


def read_pieces(
    path: Path, *, sample_rate: int, expected_duration_sec: float | None = None
) -> Iterator[np.ndarray]:
    """Read a recording piece by piece; the pieces together are what reading it at once would give.

    Args:
        path: audio file, mono or stereo. Of Opus, the decoder's delay at the start is kept, as sphn does.
        sample_rate: samples per second of the result; the file is resampled when it has another rate.
        expected_duration_sec: what a manifest says, in seconds; the file may be 0.1 s shorter or 1 s longer.

    Yields:
        float32 samples, `[channels, n]`, of a file of `n` samples per channel together
        `round(n * sample_rate / file_rate)`.

    Raises:
        DataError: the file is unreadable, truncated or empty, holds NaN or infinite samples, or does not last
            as long as expected; which may become known after some pieces.
    """
    header = read_audio_header(path)
    blocks = _checked(path, _decode(path), header, expected_duration_sec=expected_duration_sec)
    return _resample(path, blocks, header, sample_rate=sample_rate)


def read_channels(path: Path, *, sample_rate: int) -> np.ndarray:
    """Read a whole file: the left channel, or the only one, is Moshi, the right one the user.

    Returns:
        float32 samples, `[1 or 2, num_samples]`.

    Raises:
        DataError: see `read_pieces`.
    """
    return np.concatenate(list(read_pieces(path, sample_rate=sample_rate)), axis=1)


def read_audio(path: Path, *, sample_rate: int) -> np.ndarray:
    """Read a whole stereo file, see `read_channels`; float32 samples, `[2, num_samples]`.

    Raises:
        DataError: it is not stereo, or see `read_pieces`.
    """
    if read_audio_header(path).channels == 1:
        raise DataError(
            f"{path}: mono, which trains 9 streams instead of 17; make it a stereo file with Moshi on the "
            "left and the user on the right."
        )
    return read_channels(path, sample_rate=sample_rate)


def read_voice(path: Path, *, sample_rate: int) -> np.ndarray:
    """Read the user's voice: the only channel of a mono file, the right one of a stereo file.

    Returns:
        float32 samples, `[num_samples]`.

    Raises:
        DataError: the file is missing, or see `read_pieces`.
    """
    return read_named(path, sample_rate=sample_rate)[-1]


def read_named(path: Path, *, sample_rate: int) -> np.ndarray:
    """As `read_channels`, of a file that somebody named, which may not be there: that is said plainly."""
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    return read_channels(path, sample_rate=sample_rate)


def audio_kind(path: Path) -> Literal["opus", "wav", "flac", "other"]:
    """Tell by a file's first bytes how it is to be read; of wav files, those with plain samples are `wav`.

    Raises:
        DataError: the file cannot be opened, or is a wav file with a sample rate that no recording has.
    """
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe would wait for its other end
            raise DataError(
                f"{path}: is a pipe or device, not a file; write the audio to a file.", code="not-a-file"
            )
        with open(path, "rb") as file:
            start = file.read(4096)
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read the audio file ({reason}).") from error
    if start.startswith(b"OggS") and b"OpusHead" in start:
        return "opus"
    chunk = start.find(b"fmt ")
    if start.startswith(b"RIFF") and 0 < chunk <= len(start) - 16:  # before sphn looks, which panics at 0
        _check_rate(path, int.from_bytes(start[chunk + 12 : chunk + 16], "little"))
    if open_wav(path) is not None:
        return "wav"
    return "flac" if start.startswith(b"fLaC") else "other"


def _check_rate(path: Path, sample_rate: float) -> None:
    low, high = SAMPLE_RATES
    if not low <= sample_rate <= high:
        raise DataError(
            f"{path}: has {sample_rate:g} samples per second, {low:,} to {high:,} are read; export it again.",
            code="sample-rate",
        )


def _read_header(path: Path, kind: str) -> AudioHeader:
    if kind == "opus":
        return read_opus_header(path)
    wav = open_wav(path) if kind == "wav" else None
    if wav is not None:
        return wav.header
    if kind == "flac" and not flac_samples(path):
        raise DataError(
            f"{path}: does not say how long it is, as a flac file that was written to a pipe; encode it into "
            "a file.",
            code="unreadable",
        )
    return open_audio(path)[1]


def flac_samples(path: Path) -> int:
    """How many samples a flac file claims, 0 where it does not know."""
    with open(path, "rb") as file:
        start = file.read(26)
    return int.from_bytes(start[18:26], "big") & 0xFFFFFFFFF


def _decode(path: Path) -> Iterator[np.ndarray]:
    """Yield blocks at the file's own rate."""
    kind = audio_kind(path)
    header = _read_header(path, kind)
    wav = open_wav(path) if kind == "wav" else None
    if wav is not None:
        yield from read_wav(path, wav, block_samples=BLOCK_SEC * header.sample_rate)
    elif kind == "flac":
        yield from _decode_blocks(path)
    elif kind == "opus":
        check_opus_length(path, header)
        with readable(path):
            samples = sphn.read_opus(path)[0]
        # The last packet is filled up with what the length in the header leaves out.
        yield np.asarray(samples, np.float32)[:, : header.num_samples]
    else:
        yield _decode_whole(path, header)


def _decode_whole(path: Path, header: AudioHeader) -> np.ndarray:
    reader, _ = open_audio(path)
    # sphn makes room for all that it is asked for, so a claim that the file has no room for is none.
    claimed_sec = header.num_samples / header.sample_rate
    is_known = claimed_sec <= path.stat().st_size / LEAST_BYTES_PER_SEC and not _is_guessed(path)
    with readable(path):
        limit_sec = claimed_sec + 2 * MAX_EXCESS_SEC
        samples = np.asarray(reader.decode(0.0, limit_sec) if is_known else reader.decode_all(), np.float32)
    if is_known and samples.shape[1] > header.num_samples + MAX_EXCESS_SEC * header.sample_rate:
        raise contradiction(path, header, samples.shape[1])
    return samples


def _is_guessed(path: Path) -> bool:
    """Whether a file is mp3 without a header that says its length: sphn guesses it from the first frames."""
    with open(path, "rb") as file:
        start = file.read(10)
        if start.startswith(b"ID3") and len(start) == 10:
            sizes = zip(start[6:], (21, 14, 7, 0), strict=True)
            file.seek(10 + sum((byte & 0x7F) << shift for byte, shift in sizes))
            start = b""
        start += file.read(4096)
    is_mp3 = start[:1] == b"\xff" and len(start) > 1 and start[1] & 0xE0 == 0xE0
    return is_mp3 and not any(name in start for name in (b"Xing", b"Info", b"VBRI"))


def _decode_blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield blocks of whole seconds, between which the file has exact positions."""
    reader, header = open_audio(path)
    num_samples = 0
    overlap = OVERLAP_SEC * header.sample_rate
    start_sec, previous = 0, None
    while True:
        with readable(path):
            if previous is None:
                block = reader.decode(0.0, float(BLOCK_SEC))
            else:
                block = reader.decode(float(start_sec - OVERLAP_SEC), float(BLOCK_SEC + OVERLAP_SEC))
        block = np.asarray(block, np.float32)
        if previous is not None:
            # sphn looks for the position in the file: see that it has found it.
            if not np.array_equal(block[:, :overlap], previous[:, -overlap:]):
                raise DataError(
                    f"{path}: cannot be read in blocks, its frames are damaged; make it a wav file."
                )
            block = block[:, overlap:]
        num_samples += block.shape[1]
        if num_samples > header.num_samples:
            raise contradiction(path, header, num_samples)
        if block.shape[1]:
            yield block
        if block.shape[1] < BLOCK_SEC * header.sample_rate:
            return
        start_sec, previous = start_sec + BLOCK_SEC, block


def _checked(
    path: Path, blocks: Iterable[np.ndarray], header: AudioHeader, *, expected_duration_sec: float | None
) -> Iterator[np.ndarray]:
    num_samples = 0
    for block in blocks:
        check_finite_samples(path, block)
        num_samples += block.shape[1]
        yield block
    check_length(path, num_samples, header)
    if expected_duration_sec is not None:
        duration_sec = num_samples / header.sample_rate
        check_duration(path, duration_sec, expected_duration_sec=expected_duration_sec)


def _resample(
    path: Path, blocks: Iterator[np.ndarray], header: AudioHeader, *, sample_rate: int
) -> Iterator[np.ndarray]:
    """Yield blocks at another rate, together `round(n * sample_rate / file_rate)` samples."""
    if header.sample_rate == sample_rate:
        yield from blocks
        return
    stream = soxr.ResampleStream(header.sample_rate, sample_rate, header.channels)
    num_read = num_written = 0
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        num_read += block.shape[1]
        samples = stream.resample_chunk(np.ascontiguousarray(block.T), last=following is None).T
        if following is None:
            total = resampled_length(path, num_read, file_rate=header.sample_rate, sample_rate=sample_rate)
            samples = fit_length(samples, total - num_written)
        num_written += samples.shape[1]
        yield samples
        block = following


def silence_stderr() -> None:
    """Decoders written in Rust say there that they panic, which becomes a finding anyway."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def limit_sec(path: Path) -> float:
    """How long a file may keep a process busy, in seconds."""
    try:
        return LIMIT_SEC + os.stat(path).st_size / LIMIT_BYTES_PER_SEC
    except (OSError, ValueError):
        return LIMIT_SEC
