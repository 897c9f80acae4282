"""The one place that knows ranks, processes and devices."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.errors import ConfigError


def get_rank() -> int:
    """Rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return get_rank() == 0


def choose_device(name: str) -> torch.device:
    """The device of this process.

    Args:
        name: `auto` (CUDA where there is some, else CPU) or a torch device; under torchrun each process
            takes the CUDA device of its local rank.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device: {name!r} is not a device, expected auto, cpu, cuda, cuda:1 or mps."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} is not available on this machine; use device: cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device: {name!r} is not available on this machine; use device: cpu.")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; nothing to do without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def set_up_logging() -> None:
    """Log lines of this project to standard output, from the main process only."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR
    for name in ("finetune", "moshi_ttt"):
        logging.getLogger(name).setLevel(level)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes (the same tensor without torchrun)."""
    if get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them act alike."""
    if get_world_size() == 1:
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag))).item())


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes."""
    if get_world_size() == 1:
        return
    pending = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def broadcast_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the main process's values."""
    if get_world_size() == 1:
        return
    for parameter in parameters:
        dist.broadcast(parameter.data, src=0)
