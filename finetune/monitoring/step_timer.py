"""Where the time of a training step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class StepTimer:
    """Seconds of the phases of one step.

    On a GPU the phases are measured by events between its kernels; nothing waits for it before `seconds`.

    Args:
        device: of the training.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        self._spans: list[tuple[str, float | tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the step; what a phase has had before is added to."""
        if self._device.type == "cuda" and name != "data":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._spans.append((name, (first, last)))
            return
        started = time.perf_counter()
        yield
        self._spans.append((name, time.perf_counter() - started))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, of `other`, and `total` since the start; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total = time.perf_counter() - self._started
        spent = dict.fromkeys(PHASES, 0.0)
        for name, span in self._spans:
            spent[name] += span if isinstance(span, float) else span[0].elapsed_time(span[1]) / 1000
        return spent | {"other": max(total - sum(spent.values()), 0.0), "total": total}
