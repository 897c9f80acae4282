"""A file of Mimi codes in safetensors' format, of which no bit can change unnoticed.

Its header has a line of facts with a checksum of its own, and in it one checksum for each block of frames, so
that reading a chunk of a long recording checks what it reads and no more.

Shapes: K codebooks of one channel, T frames.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from finetune.errors import DataError, one_line
from finetune.files import hash_json
from moshi_ttt.files.regular_file import regular_only

FORMAT_VERSION = 2
BLOCK_FRAMES = 256

_DTYPES: dict[str, np.dtype] = {"I16": np.dtype("<i2"), "I32": np.dtype("<i4")}
# One key: safetensors writes several in any order, and the same codes are to be the same file.
_FACTS = "moshi_ttt_codes"


class CacheError(DataError):
    """The code cache's own fault, nothing that a recording could be blamed for."""


class CorruptCodesError(CacheError):
    """A file of codes is damaged, or belongs to something else."""


@dataclass(frozen=True)
class CodeEntry:
    """What a file of codes says about itself; the checksum of these facts has been verified.

    Attributes:
        path: the file.
        key: hash of all that decides which file a recording has.
        codec: hash of the codec's weights and configuration and of K.
        audio_bytes: size of the audio file.
        audio_sha256: of the audio file's bytes.
        channels: 1 or 2.
        num_codebooks: K.
        num_frames: T.
        checksums: CRC-32 of each block of `BLOCK_FRAMES` frames, all channels and codebooks.
        dtype: of the stored codes.
        offset: where they start in the file, in bytes.
    """

    path: Path
    key: str
    codec: str
    audio_bytes: int
    audio_sha256: str
    channels: int
    num_codebooks: int
    num_frames: int
    checksums: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(channels, K, T)`."""
        return self.channels, self.num_codebooks, self.num_frames

    @property
    def source_digest(self) -> str:
        """Of all that the codes were made from: the audio file's bytes and the codec."""
        return hash_json([self.audio_sha256, self.codec])

    @property
    def content_digest(self) -> str:
        """Of the codes themselves."""
        return hash_json([self.shape, self.checksums])


def code_file_bytes(codes: Tensor, *, key: str, codec: str, audio_bytes: int, audio_sha256: str) -> bytes:
    """The content of a file; the same arguments give the same bytes.

    Args:
        codes: `[channels, K, T]`, not negative.
        key, codec, audio_bytes, audio_sha256: see `CodeEntry`.
    """
    small = codes.to(torch.int16 if codes.max() <= torch.iinfo(torch.int16).max else torch.int32).contiguous()
    facts = {
        "format": FORMAT_VERSION,
        "key": key,
        "codec": codec,
        "audio_bytes": audio_bytes,
        "audio_sha256": audio_sha256,
        "shape": list(codes.shape),
        "checksums": [zlib.crc32(block) for block in _blocks(small.numpy())],
    }
    text = json.dumps(facts, sort_keys=True)
    return save({"codes": small}, metadata={_FACTS: f"{zlib.crc32(text.encode()):08x} {text}"})


def read_entry(path: Path) -> CodeEntry:
    """Read a file's header, not its codes.

    Raises:
        FileNotFoundError: there is no file.
        CorruptCodesError: it is damaged, or something else.
    """
    try:
        with open(path, "rb", opener=regular_only) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= num_bytes - 8:
                raise ValueError("it is cut off or no safetensors file")
            header = json.loads(file.read(header_bytes))
        return _parse(path, header, offset=8 + header_bytes, num_bytes=num_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise corrupt(path, error.strerror or str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise corrupt(path, str(error) or type(error).__name__) from error


def read_codes(entry: CodeEntry, start_frame: int, stop_frame: int) -> Tensor:
    """Read frames and check the blocks that hold them.

    Returns:
        int64 codes, `[channels, K, stop_frame - start_frame]`.

    Raises:
        CorruptCodesError: a bit of these blocks has changed, or they hold something else.
        ValueError: the frames are not within the recording.
    """
    if not 0 <= start_frame <= stop_frame <= entry.num_frames:
        raise ValueError(f"{entry.path}: frames {start_frame} to {stop_frame} of {entry.num_frames}.")
    first_block, last_block = start_frame // BLOCK_FRAMES, -(-stop_frame // BLOCK_FRAMES)
    first_frame = first_block * BLOCK_FRAMES
    try:
        stored = np.memmap(entry.path, entry.dtype, mode="r", offset=entry.offset, shape=entry.shape)
        codes = np.array(stored[:, :, first_frame : last_block * BLOCK_FRAMES])
    except (OSError, ValueError) as error:
        raise corrupt(entry.path, str(error)) from error
    checksums = entry.checksums[first_block:last_block]
    if any(zlib.crc32(block) != known for block, known in zip(_blocks(codes), checksums, strict=True)):
        raise corrupt(entry.path, "its checksum is wrong, a part of it has changed")
    if codes.size and codes.min() < 0:
        raise corrupt(entry.path, "it holds negative numbers, not codes")
    wanted = codes[:, :, start_frame - first_frame : stop_frame - first_frame]
    return torch.from_numpy(wanted.astype(np.int64))


def corrupt(path: Path, reason: str) -> CorruptCodesError:
    """The error of a file that cannot be used."""
    return CorruptCodesError(
        f"{path}: unusable cache file ({one_line(reason)}); delete it, the next start encodes it again."
    )


def _parse(path: Path, header: dict[str, Any], *, offset: int, num_bytes: int) -> CodeEntry:
    checksum, _, text = header["__metadata__"][_FACTS].partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError("the checksum of its header is wrong, a part of it has changed")
    facts = json.loads(text)
    channels, num_codebooks, num_frames = facts["shape"]
    dtype = _DTYPES[header["codes"]["dtype"]]
    data_bytes = channels * num_codebooks * num_frames * dtype.itemsize
    if header["codes"]["shape"] != facts["shape"] or header["codes"]["data_offsets"] != [0, data_bytes]:
        raise ValueError("its header contradicts itself")
    if offset + data_bytes != num_bytes:
        raise ValueError(f"it has {num_bytes} bytes instead of {offset + data_bytes}")
    if channels not in (1, 2) or num_frames < 1 or facts["format"] != FORMAT_VERSION:
        raise ValueError(f"it has the shape {facts['shape']} and format {facts['format']}")
    return CodeEntry(
        path=path,
        key=facts["key"],
        codec=facts["codec"],
        audio_bytes=facts["audio_bytes"],
        audio_sha256=facts["audio_sha256"],
        channels=channels,
        num_codebooks=num_codebooks,
        num_frames=num_frames,
        checksums=tuple(facts["checksums"]),
        dtype=dtype,
        offset=offset,
    )


def _blocks(codes: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of each block of frames of `[channels, K, n]`."""
    for start in range(0, codes.shape[2], BLOCK_FRAMES):
        yield codes[:, :, start : start + BLOCK_FRAMES].tobytes()
