"""The one place that knows ranks, processes and devices."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from finetune.errors import ConfigError, UserError, printable

# What gloo and NCCL say where the other side is gone; they have no type of error for it.
_SIGNS_OF_A_LOST_PROCESS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exit",
)


def get_rank() -> int:
    """Rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def num_started() -> int:
    """Number of processes that torchrun has started, before they have joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
def process_group(device: torch.device, *, alone: bool = False) -> Iterator[None]:
    """Join the processes that torchrun started, unless they have joined already.

    Args:
        device: of this process.
        alone: form a group without torchrun as well, of this process; otherwise there is nothing to do then.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Long enough for one process to encode a large data set while the others wait.
    timeout = timedelta(hours=12)
    if dist.is_initialized():
        yield
        return
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    elif alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        yield
        return
    with _one_tells():
        yield
    # Not after an error: other processes may wait in a collective, and destroying would wait for them.
    dist.destroy_process_group()


@contextmanager
def _one_tells() -> Iterator[None]:
    """Let a run end with one line, that of the process that ends first.

    It takes the others with it: what they wait for together fails.

    Raises:
        UserError: that of the block, or another process is gone; silent where one has said why.
    """
    try:
        yield
    except UserError as error:
        # A silent one leaves it to another process, and what is this one's own is said by it.
        if not str(error) or _is_first_to_end() or not error.of_all:
            error.of_all = False
            raise
        raise UserError("") from None
    except RuntimeError as error:
        first = _is_first_to_end()
        if not any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS):
            raise
        lost = UserError(
            f"process {get_rank()} of {get_world_size()}: another process of this run was lost (killed, or "
            "its machine is gone); saved checkpoints are intact, go on with --resume auto."
        )
        lost.of_all = False
        raise (lost if first else UserError("")) from None
    except BaseException as error:
        if is_main() or not isinstance(error, KeyboardInterrupt):  # of which the main one tells
            _is_first_to_end()
        raise


def _is_first_to_end() -> bool:
    """Note in the run's common store that this process ends early; whether no other had noted it."""
    try:
        # The only way to it: a store of our own would need an address of its own.
        return dist.distributed_c10d._get_default_store().add("moshi-ttt/ended", 1) == 1
    except RuntimeError:
        return True  # the store was in the process that is lost


class ConsoleHandler(logging.Handler):
    """Log lines on the terminal: one line each, whatever stands in them, and beside a progress bar.

    Args:
        form: of a line, as logging has it.
        lines_to_stdout: where what is no warning goes to standard output. Once nobody reads that any more it
            goes to standard error too; a training does not end for it.
    """

    def __init__(self, form: str = "%(message)s", *, lines_to_stdout: bool = False) -> None:
        super().__init__()
        self._lines_to_stdout = lines_to_stdout
        self.setFormatter(_OneLineFormatter(form, datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if self._lines_to_stdout and record.levelno < logging.WARNING:
            try:
                self._write(record, sys.stdout)
                return
            except OSError:
                self._lines_to_stdout = False
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it is flushed at the very end
        try:
            self._write(record, sys.stderr)
        except OSError:
            self.handleError(record)

    def _write(self, record: logging.LogRecord, stream: TextIO) -> None:
        tqdm.write(self.format(record), file=stream)
        stream.flush()


class _OneLineFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(printable(line) for line in super().formatException(ei).splitlines())


def set_up_logging(*, lines_to_stdout: bool = True) -> None:
    """Log lines of this project to the terminal, from the main process only.

    Args:
        lines_to_stdout: False where standard output is for a result; then they go to standard error, as
            warnings and errors always do.
    """
    handler = ConsoleHandler("%(asctime)s %(message)s", lines_to_stdout=lines_to_stdout)
    logging.basicConfig(handlers=[handler], force=True)
    level = logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR
    for name in ("finetune", "moshi_ttt"):
        logging.getLogger(name).setLevel(level)
    # It repeats the tracebacks of errors that are reported in one line.
    logging.getLogger("c10d-NullHandler-dcp_logger").propagate = False


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


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """A small picklable value of every process, by rank."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
