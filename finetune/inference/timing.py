"""How long frames take, against the 80 ms in which the next one arrives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from moshi.models.loaders import FRAME_RATE

FRAME_MS = 1000 / FRAME_RATE


class FrameTimes:
    """Wall-clock times of frames, in memory that grows by 8 bytes each."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Times what happens inside."""
        start = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - start)

    def summary(self) -> dict[str, float]:
        """Frames, seconds of audio, seconds of computing, their ratio, and latencies in milliseconds.

        `real_time_factor` is computing over audio: below 1 is faster than real time.
        """
        times = np.array(self._seconds or [0.0])
        audio_sec = len(self._seconds) / FRAME_RATE
        return {
            "num_frames": len(self._seconds),
            "audio_sec": audio_sec,
            "compute_sec": float(times.sum()),
            "real_time_factor": float(times.sum()) / audio_sec if audio_sec else float("nan"),
            "latency_median_ms": float(np.median(times)) * 1000,
            "latency_p99_ms": float(np.percentile(times, 99)) * 1000,
            "latency_max_ms": float(times.max()) * 1000,
            "frame_ms": FRAME_MS,
            "share_within_frame": float((times * 1000 <= FRAME_MS).mean()),
        }
