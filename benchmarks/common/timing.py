"""Times of candidates that do the same work, measured side by side.

On the CPU with one thread a time is process time: what other programs do at the same moment counts little,
and waiting for a disk does not count. With several threads it is wall-clock time, since process time would
add up the threads. On a GPU it is the time between two CUDA events around the call, so that waiting for the
CPU to launch kernels is in it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common.settings import Settings


@dataclass(frozen=True)
class Times:
    """Repetitions of one candidate, in seconds, in the order in which they ran."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Seconds."""
        return min(self.seconds)

    def record(self, *, per: int = 1) -> dict[str, Any]:
        """Median and repetitions for the report, each divided by `per`, the units of work of a call."""
        return {
            "median_seconds": self.median / per,
            "seconds": [seconds / per for seconds in self.seconds],
        }


def clock_name(settings: Settings) -> str:
    """Which clock the times are of."""
    if settings.device.type == "cuda":
        return "cuda events"
    return "process time" if settings.threads == 1 else "wall clock"


def interleaved(candidates: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Times]:
    """Run every candidate once to warm up, then once per repetition, every other time in reverse order.

    A machine that slows down for a while slows all candidates down alike, and none is always the first.

    Args:
        candidates: what to time, by name; a result is dropped at once.
        settings: device, threads and number of repetitions.

    Returns:
        Times by name.
    """
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(settings.repetitions):
        names = list(candidates)
        for name in names if repetition % 2 == 0 else reversed(names):
            gc.collect()
            gc.disable()  # a collection in the middle would be charged to whoever comes by
            try:
                seconds[name].append(_time(candidates[name], settings))
            finally:
                gc.enable()
    return {name: Times(values) for name, values in seconds.items()}


def _time(call: Callable[[], object], settings: Settings) -> float:
    if settings.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(settings.device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(settings.device)
        return start.elapsed_time(end) / 1e3
    clock = time.process_time if settings.threads == 1 else time.perf_counter
    before = clock()
    call()
    return clock() - before
