"""Audio files for tests, in formats that sphn only reads."""

import struct
from pathlib import Path

import numpy as np


def noise(num_samples: int, channels: int = 1, *, seed: int = 0) -> np.ndarray:
    """Float32 `[channels, num_samples]`."""
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, num_samples))
    return samples.astype(np.float32)


def write_flac(path: Path, samples: np.ndarray, sample_rate: int, *, frame_samples: int = 4096) -> None:
    """Write `[channels, n]` as 16-bit FLAC whose subframes are verbatim: nothing is compressed."""
    channels, num_samples = samples.shape
    pcm = np.round(samples * 32767).astype(">i2")
    packed = (sample_rate << 44) | ((channels - 1) << 41) | (15 << 36) | num_samples
    info = struct.pack(">HH", frame_samples, frame_samples) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    content = b"fLaC" + b"\x80" + len(info).to_bytes(3, "big") + info
    for number, start in enumerate(range(0, num_samples, frame_samples)):
        block = pcm[:, start : start + frame_samples]
        # Sync, block size of 16 bits below, rate as in the file's header; channels, bits as there.
        header = b"\xff\xf8\x70" + bytes([(channels - 1) << 4]) + chr(number).encode()
        header += struct.pack(">H", block.shape[1] - 1)
        frame = header + bytes([_crc(header, 0x07, 8)])
        frame += b"".join(b"\x02" + channel.tobytes() for channel in block)
        content += frame + _crc(frame, 0x8005, 16).to_bytes(2, "big")
    path.write_bytes(content)


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    mask = (1 << bits) - 1
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = ((value << 1) & mask) ^ (polynomial if value >> (bits - 1) else 0)
        table.append(value)
    crc = 0
    for byte in data:
        crc = ((crc << 8) & mask) ^ table[(crc >> (bits - 8)) ^ byte]
    return crc
