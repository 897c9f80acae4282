"""Worker processes that survive each other: one that dies costs the recording it worked on, no more."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from finetune.errors import UserError


class Outcome(NamedTuple):
    """What became of one task: `error` is None where it succeeded."""

    task: Any
    error: str | None


class _Worker(NamedTuple):
    process: Any
    connection: Connection
    number: int


def run_tasks(
    prepare: Callable[[int], Callable[[Any], str | None]], tasks: Sequence[Any], *, num_workers: int
) -> Iterator[Outcome]:
    """Does tasks in several processes and yields what became of each, in the order in which they end.

    Args:
        prepare: called once in each process with its number from 0; returns what does a task and returns an
            error in one line, or None. Both must be importable from another process.
        tasks: what is done.
        num_workers: processes; with 1, everything happens in this one.

    Raises:
        UserError: `prepare` raised one in a worker.
    """
    if num_workers == 1:
        work = prepare(0)
        for task in tasks:
            yield Outcome(task, work(task))
        return
    waiting = deque(tasks)
    busy: dict[Connection, tuple[_Worker, Any]] = {}
    try:
        for number in range(min(num_workers, len(tasks))):
            _hand_out(_start(prepare, number), waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                worker, task = busy.pop(connection)
                outcome, worker = _collect(worker, task, prepare, has_more=bool(waiting))
                if worker is not None:
                    _hand_out(worker, waiting, busy)
                yield outcome
    finally:
        for worker, _ in busy.values():
            _stop(worker)


def _start(prepare: Callable[[int], Callable[[Any], str | None]], number: int) -> _Worker:
    # Not forked: a GPU that was used before cannot be used in a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(prepare, number, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, number)


def _hand_out(worker: _Worker, waiting: deque, busy: dict[Connection, tuple[_Worker, Any]]) -> None:
    if not waiting:
        _stop(worker)
        return
    task = waiting.popleft()
    with suppress(OSError):  # it may have died meanwhile; reading will say so
        worker.connection.send(task)
    busy[worker.connection] = (worker, task)


def _collect(
    worker: _Worker, task: Any, prepare: Callable[[int], Callable[[Any], str | None]], *, has_more: bool
) -> tuple[Outcome, _Worker | None]:
    """Reads a worker's answer; a new worker takes the place of a dead one while there is work."""
    try:
        answer = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        status = worker.process.exitcode
        how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        outcome = Outcome(task, f"the process that worked on it was {how}.")
        return outcome, _start(prepare, worker.number) if has_more else None
    if isinstance(answer, UserError):
        _stop(worker)
        raise answer
    return Outcome(task, answer), worker


def _stop(worker: _Worker) -> None:
    worker.process.terminate()
    worker.process.join()
    worker.connection.close()


def _serve(
    prepare: Callable[[int], Callable[[Any], str | None]], number: int, connection: Connection
) -> None:
    """The loop of a worker. It ends when the other side goes away, whatever became of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    try:
        work = prepare(number)
    except UserError as error:
        connection.send(error)
        return
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(work(task))
