"""Debian packages and encoded sounds that tests make themselves."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np


def write_package(path: Path, files: dict[str, bytes], others: Sequence[tarfile.TarInfo] = ()) -> None:
    """A `.deb`: an ar archive whose last member is a compressed tar archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)
    content = b"!<arch>\n"
    for name, member in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", data.getvalue()),
    ):
        content += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode() + member
        content += b"\n" * (len(member) % 2)
    path.write_bytes(content)


def encode_sound(samples: np.ndarray, *, rate: int, file_format: str, codec: str) -> bytes:
    """Encode [num_samples] of one channel."""
    file = io.BytesIO()
    with av.open(file, "w", format=file_format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        pcm = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)
        frames = [part for whole in (frame, None) for part in resampler.resample(whole)]
        for packet in (packet for part in (*frames, None) for packet in stream.encode(part)):
            container.mux(packet)
    return file.getvalue()
