"""Batches of chunks, loaded ahead in processes that end with whoever reads the batches."""

import multiprocessing
import signal
from collections.abc import Collection, Generator, Iterable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from finetune.data.batches.dataset import Batch, ChunkDataset
from finetune.data.processes import how_it_ended
from finetune.errors import DataError, UserError

_GRACE_SEC = 20  # for a step to end; schedulers that ask a job to end kill it 30 seconds later

_T = TypeVar("_T")


class Batches:
    """A DataLoader whose workers' DataErrors arrive as they were raised, and whose workers end.

    Torch would wrap a worker's exception, and its one line for the user would become a traceback. It ends
    its workers when nothing refers to them any more, which an exception on its way up delays.
    """

    def __init__(
        self, dataset: ChunkDataset, batches: Iterable[list[int]], *, num_workers: int, pin_memory: bool
    ) -> None:
        self._loader = DataLoader(
            _BatchFetcher(dataset),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_main_process,
        )

    def __iter__(self) -> Generator[Batch, None, None]:
        """Start the workers and yield batches; closing the generator ends the workers."""
        others = multiprocessing.active_children()
        batches = _start(self._loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            while (batch := _next(batches, workers)) is not None:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        finally:
            _end(batches, workers)


def build_train_loader(
    dataset: ChunkDataset, sampler: Iterable[list[int]], *, num_workers: int, pin_memory: bool = False
) -> Batches:
    """Endless batches of this rank; the same ones for any `num_workers`.

    Args:
        dataset: the chunks, at least one.
        sampler: chunk indices of each batch, `GlobalBatchSampler` or `ContiguousBatchSampler`.
        num_workers: loader processes; 0 loads in this process.
        pin_memory: put batches into pinned memory, for copies to a GPU.

    Raises:
        DataError: while iterating, when a chunk cannot be loaded.
        UserError: while iterating, when a loader process is lost.
    """
    return Batches(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)


def build_eval_loader(dataset: ChunkDataset, batches: Iterable[list[int]]) -> Batches:
    """The batches of one pass, loaded in this process.

    Args:
        dataset: the chunks.
        batches: chunk indices of each batch, of `eval_rows` or `follow_recordings`; none is empty.

    Raises:
        DataError: while iterating, when a chunk cannot be loaded.
    """
    return Batches(dataset, batches, num_workers=0, pin_memory=False)


class _BatchFetcher(Dataset[Batch]):
    """Hands a DataLoader whole batches, or the error in place of one."""

    def __init__(self, dataset: ChunkDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Batch | DataError:
        # Torch's fetcher prefers this method, which sees all indices of a batch at once.
        try:
            return self.dataset.batch(indices)
        except DataError as error:
            return error


def _start(loader: DataLoader) -> Any:
    # Torch reports a lost worker by an exception in whatever this process does at that moment, which may be
    # a save. Without its handler it notices when it waits for that worker.
    if not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return batches


def _next(batches: Any, workers: Collection[BaseProcess]) -> Batch | DataError | None:
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError):  # the latter of a batch whose worker is gone already
        ending = wait([worker.sentinel for worker in workers], timeout=1)
        for worker in workers:
            if worker.sentinel in ending:
                worker.join(timeout=1)  # its files are closed before it has ended
        lost = [worker for worker in workers if worker.exitcode]
        if not lost:
            raise
        raise UserError(
            f"a process that loads data was {how_it_ended(lost[0])}; saved checkpoints are intact. Go on "
            "with --resume auto, with fewer data.num_workers where memory is short."
        ) from None


def _end(batches: Any, workers: Collection[BaseProcess]) -> None:
    try:
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown_workers()  # what its __del__ does, whoever still refers to it
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal and Slurm's SIGTERM every process of the job; the main one
    # finishes its step and ends the workers. So does SIGUSR1, Slurm's warning before the time is up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: FrameType | None) -> None:
    # Not never: a main process that ends in a way of its own asks once and waits.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(_GRACE_SEC)


def _as_is(batch: _T) -> _T:
    return batch
