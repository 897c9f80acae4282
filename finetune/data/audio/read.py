"""Reading mono and stereo recordings of hours, wav and flac files in blocks of bounded memory.

All others are decoded as a whole, since a lossy stream that is entered in the middle decodes to other
samples: that takes 8 bytes per sample and channel, 2.8 GB for an hour of stereo at 48 kHz.
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
    AudioHeader,
    check_duration,
    check_finite_samples,
    check_length,
    fit_length,
    open_audio,
    readable,
    resampled_length,
)
from finetune.errors import DataError

BLOCK_SEC = 60
OVERLAP_SEC = 1
OPUS_SAMPLE_RATE = 48000
# PCM, float and the extensible form of both: formats of which any sample can be read by itself.
WAV_FORMATS = (1, 3, 0xFFFE)
# What sphn makes of other rates are allocations of terabytes and empty pieces.
SAMPLE_RATES = (1000, 768_000)
# What a process may take for a recording before it is ended: some hundred times what decoding takes.
LIMIT_SEC, LIMIT_BYTES_PER_SEC = 120, 100_000


def read_audio_header(path: Path) -> AudioHeader:
    """Read how many channels and samples a file claims, without decoding it.

    Raises:
        DataError: the file is missing or no audio that can be read, or has more than two channels or a sample
            rate that no recording has.
    """
    header = _opus_header(path) if audio_kind(path) == "opus" else open_audio(path)[1]
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


def read_audio(path: Path, *, sample_rate: int) -> np.ndarray:
    """Read a whole stereo file: left channel Moshi, right channel the user.

    Returns:
        float32 samples, `[2, num_samples]`.

    Raises:
        DataError: it is not stereo, or see `read_pieces`.
    """
    if read_audio_header(path).channels == 1:
        raise DataError(
            f"{path}: mono, which trains 9 streams instead of 17; make it a stereo file with Moshi on the "
            "left and the user on the right."
        )
    return np.concatenate(list(read_pieces(path, sample_rate=sample_rate)), axis=1)


def read_voice(path: Path, *, sample_rate: int) -> np.ndarray:
    """Read the user's voice: the only channel of a mono file, the right one of a stereo file.

    Returns:
        float32 samples, `[num_samples]`.

    Raises:
        DataError: the file is missing, or see `read_pieces`.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    return np.concatenate([piece[-1] for piece in read_pieces(path, sample_rate=sample_rate)])


def audio_kind(path: Path) -> Literal["opus", "lossless", "other"]:
    """Tell by a file's first bytes how it is to be read.

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
    wav_format = int.from_bytes(start[chunk + 8 : chunk + 10], "little")
    is_wav = start.startswith(b"RIFF") and chunk > 0
    if is_wav and len(start) >= chunk + 16:  # before sphn looks, which panics at a rate of 0
        _check_rate(path, int.from_bytes(start[chunk + 12 : chunk + 16], "little"))
    plain_wav = is_wav and wav_format in WAV_FORMATS
    return "lossless" if plain_wav or start.startswith(b"fLaC") else "other"


def _check_rate(path: Path, sample_rate: float) -> None:
    low, high = SAMPLE_RATES
    if not low <= sample_rate <= high:
        raise DataError(
            f"{path}: has {sample_rate:g} samples per second, {low:,} to {high:,} are read; export it again.",
            code="sample-rate",
        )


def _opus_header(path: Path) -> AudioHeader:
    """Channels from the first page, length from the last one, which sphn has no call for."""
    with open(path, "rb") as file:
        start = file.read(4096)
        # A page has at most 65,307 bytes.
        file.seek(max(0, path.stat().st_size - 65536))
        end = file.read()
    page = end.rfind(b"OggS")
    head = start.find(b"OpusHead")
    if page < 0 or len(end) < page + 14 or len(start) < head + 19:
        raise DataError(f"{path}: cannot be read as Ogg-Opus; is it complete?")
    num_samples = int.from_bytes(end[page + 6 : page + 14], "little", signed=True)
    return AudioHeader(start[head + 9], OPUS_SAMPLE_RATE, max(0, num_samples))


def _decode(path: Path) -> Iterator[np.ndarray]:
    """Yield blocks at the file's own rate."""
    kind = audio_kind(path)
    if kind == "lossless":
        yield from _decode_blocks(path)
    elif kind == "opus":
        with readable(path):
            samples = sphn.read_opus(path)[0]
        # The last packet is filled up with what the length in the header leaves out.
        yield np.asarray(samples, np.float32)[:, : _opus_header(path).num_samples]
    else:
        reader, _ = open_audio(path)
        with readable(path):
            samples = np.asarray(reader.decode_all(), np.float32)
        yield samples


def _decode_blocks(path: Path) -> Iterator[np.ndarray]:
    """Yield blocks of whole seconds, between which the file has exact positions."""
    reader, header = open_audio(path)
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
