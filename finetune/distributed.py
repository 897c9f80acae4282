"""The one place that knows ranks, processes and devices."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune.errors import ConfigError, UserError


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
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"device: {name!r} is not a device, expected auto, cpu, cuda, cuda:1 or mps.")
    num_devices = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}[
        kind
    ]
    if len(index) > 4 or int(index or 0) >= num_devices:
        raise ConfigError(f"device: {name!r} is not available on this machine; use device: cpu.")
    device = torch.device(name)
    if device.type == "cuda":
        if "LOCAL_RANK" in os.environ or device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started; nothing to do without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Long enough for one process to encode a large data set while the others wait.
    dist.init_process_group(backend, timeout=timedelta(hours=12))
    yield
    # Not after an error: other processes may wait in a collective, and destroying would wait for them.
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


@contextmanager
def alike() -> Iterator[None]:
    """Let all processes leave the block in the same way: an error of one ends the others too.

    Raises:
        UserError: that of the block, or in the other processes a silent one.
    """
    error: UserError | None = None
    try:
        yield
    except UserError as caught:
        error = caught
        error.of_all = False
    failed = any_process(error is not None)
    if error is not None:
        raise error
    if failed:
        raise UserError("")


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes."""
    if get_world_size() == 1:
        return
    pending = []
    for parameter in parameters:
        unused = parameter.grad is None
        if unused:
            parameter.grad = torch.zeros_like(parameter)
        pending.append((parameter, unused, dist.all_reduce(parameter.grad, async_op=True)))
    for parameter, unused, work in pending:
        work.wait()
        if unused and not parameter.grad.any():
            parameter.grad = None  # unused everywhere: no step, no decay, as in a single process


def broadcast_parameters(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the main process's values."""
    if get_world_size() == 1:
        return
    for parameter in parameters:
        dist.broadcast(parameter.data, src=0)
