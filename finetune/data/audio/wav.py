"""Wav files of PCM or float samples, by the samples that are there: a header may have been written too early.

A program that writes to a pipe cannot come back to its header: it leaves 0 there, or what is
near 2^31 or 2^32.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from finetune.data.audio.checks import AudioHeader, truncated_error

_MAGIC = (b"RIFF", b"RF64", b"BW64")
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_MOST_CHUNKS = 1000
# What programs write in place of a size that they do not know, or only roughly.
_UNKNOWN_SIZES = (range(0x7FFF0000, 0x80010000), range(0xFFFF0000, 0x100000000))


@dataclass(frozen=True)
class WavFile:
    """Where the samples of a wav file are, and what they look like.

    Attributes:
        header: channels, rate, and how many samples it claims, or holds where it cannot know.
        start: of the samples, in bytes.
        is_float: floating-point samples.
        width: of a sample, in bytes.
    """

    header: AudioHeader
    start: int
    is_float: bool
    width: int


def open_wav(path: Path) -> WavFile | None:
    """Find the samples of a wav file.

    Returns:
        None for any other file, other samples than PCM and float, and a header that makes no sense.

    Raises:
        OSError: it cannot be read.
        DataError: it holds fewer samples than its header claims.
    """
    with open(path, "rb") as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(12)
        if start[:4] not in _MAGIC or start[8:] != b"WAVE":
            return None
        form: bytes = b""
        long_size = None
        for name, size, position in _chunks(file, 12, file_size):
            if name == b"fmt ":
                form = file.read(min(size, 40))
            elif name == b"ds64" and size >= 16:
                long_size = int.from_bytes(file.read(16)[8:], "little")
            elif name == b"data":
                size = long_size if long_size is not None and size == 0xFFFFFFFF else size
                return _wav_file(file, path, form, position, size, file_size)
    return None


def read_wav(path: Path, wav: WavFile, *, block_samples: int) -> Iterator[np.ndarray]:
    """Yield the samples in blocks, float32 `[channels, n]`."""
    channels = wav.header.channels
    left = wav.header.num_samples
    with open(path, "rb") as file:
        file.seek(wav.start)
        while left:
            count = min(left, block_samples)
            data = file.read(count * channels * wav.width)
            samples = _to_float(data[: len(data) // (channels * wav.width) * channels * wav.width], wav)
            if not len(samples):
                return
            yield np.ascontiguousarray(samples.reshape(-1, channels).T)
            left -= count


def _chunks(file: BinaryIO, position: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, size and first byte of chunks, the file being there."""
    for _ in range(_MOST_CHUNKS):
        if position + 8 > end:
            return
        file.seek(position)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        yield head[:4], size, position + 8
        position += 8 + size + size % 2


def _wav_file(
    file: BinaryIO, path: Path, form: bytes, start: int, claimed_size: int, file_size: int
) -> WavFile | None:
    if len(form) < 16:
        return None
    kind, channels, block, bits = (
        int.from_bytes(form[first : first + 2], "little") for first in (0, 2, 12, 14)
    )
    rate = int.from_bytes(form[4:8], "little")
    if kind == _EXTENSIBLE and len(form) >= 26:
        valid_bits = int.from_bytes(form[18:20], "little")
        kind = int.from_bytes(form[24:26], "little") if valid_bits in (0, bits) else 0
    widths = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}.get(kind, ())
    if bits not in widths or not channels or block != channels * bits // 8 or not rate:
        return None
    held_size = file_size - start
    claimed, held = claimed_size // block, held_size // block
    if _is_unknown(file, claimed_size, held_size, start, file_size):
        claimed = held
    if claimed > held:
        raise truncated_error(path, claimed=claimed, held=held)
    return WavFile(AudioHeader(channels, rate, claimed), start, kind == _FLOAT, bits // 8)


def _is_unknown(file: BinaryIO, claimed: int, held: int, start: int, end: int) -> bool:
    if claimed > held:
        return any(claimed in sizes for sizes in _UNKNOWN_SIZES)
    if claimed or not held:
        return False
    # Of a file without samples, other chunks may follow.
    ends = [position + size for _, size, position in _chunks(file, start, end)]
    return not ends or not end - 1 <= ends[-1] <= end


def _to_float(data: bytes, wav: WavFile) -> np.ndarray:
    """Samples in a row, PCM of which the largest value is 1."""
    if wav.is_float:
        return np.frombuffer(data, f"<f{wav.width}").astype(np.float32)
    if wav.width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if wav.width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] >> 8).astype(np.float32) / 2**23
    return np.frombuffer(data, f"<i{wav.width}").astype(np.float32) / 2 ** (8 * wav.width - 1)
