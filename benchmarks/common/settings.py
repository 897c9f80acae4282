"""What a run of the benchmarks is asked to do."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from moshi_ttt.backends import Backend


@dataclass(frozen=True)
class Settings:
    """Choices that all parts share.

    Attributes:
        device: where tensors live and what is timed.
        dtype: of the Moshi layers; the operator and the fast weights are always float32.
        threads: of PyTorch on the CPU.
        repetitions: timed runs of each candidate; medians are reported.
        quick: tiny sizes, to see that everything works. The figures mean nothing.
        compiled: measure the operator's `compiled` backend too.
        fused: the same of `fused`.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    repetitions: int
    quick: bool
    compiled: bool
    fused: bool = False

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Names of the operator's backends that are measured."""
        more: dict[Backend, bool] = {"compiled": self.compiled, "fused": self.fused}
        return ("autograd", "manual", *(name for name, measured in more.items() if measured))

    @property
    def dtype_name(self) -> str:
        """As on the command line."""
        return str(self.dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """The model of the processor, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
