"""Worker processes that survive each other: one that dies costs the recording it worked on, no more."""

import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, cast

from finetune.errors import UserError

Prepare = Callable[[int], Callable[[Any], Any]]


class TaskOutcome(NamedTuple):
    """What became of one task.

    Attributes:
        task: it.
        result: what the work returned; None where its process was lost.
        failure: why its process was lost, in one line; None where it was not.
    """

    task: Any
    result: Any
    failure: str | None


class _Worker(NamedTuple):
    process: Any
    connection: Connection
    number: int
    deadline: float = math.inf  # of what it works on, as time.monotonic() counts


Busy = dict[Connection, tuple[_Worker, Any]]


def run_tasks(
    prepare: Prepare,
    tasks: Sequence[Any],
    *,
    num_workers: int,
    isolated: bool = False,
    time_limit_sec: Callable[[Any], float] | None = None,
) -> Generator[TaskOutcome, None, None]:
    """Do tasks in several processes and yield what became of each, in the order in which they end.

    Closing it ends the processes.

    Args:
        prepare: called once in each process with its number from 0; returns what does a task. Both must be
            importable from another process, and what is returned must be picklable.
        tasks: what is done.
        num_workers: processes; with 1, everything happens in this one, unless `isolated`.
        isolated: never work in this process, which a task could take down.
        time_limit_sec: of a task in seconds, after which its process is ended; needs processes.

    Raises:
        UserError: `prepare` raised one in a worker.
    """
    if num_workers == 1 and not isolated:
        work = prepare(0)
        for task in tasks:
            yield TaskOutcome(task, work(task), None)
        return
    limit = time_limit_sec or (lambda _: math.inf)
    waiting = deque(tasks)
    busy: Busy = {}
    try:
        for number in range(min(num_workers, len(tasks))):
            _hand_out(_start(prepare, number), waiting, busy, limit)
        while busy:
            # Of what it may wait for it was given connections only.
            ready = cast(list[Connection], wait(list(busy), _seconds_left(busy)))
            for connection in ready or _overdue(busy):
                worker, task = busy.pop(connection)
                collect = _collect if ready else _end_overdue
                outcome, free = collect(worker, task, prepare, has_more=bool(waiting))
                if free is not None:
                    _hand_out(free, waiting, busy, limit)
                yield outcome
    finally:
        for worker, _ in busy.values():
            _stop(worker)


def how_it_ended(process: BaseProcess) -> str:
    """What became of a process that has ended, for a sentence with "was" in front."""
    status = process.exitcode or 0
    return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _seconds_left(busy: Busy) -> float | None:
    deadline = min(worker.deadline for worker, _ in busy.values())
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


def _overdue(busy: Busy) -> list[Connection]:
    now = time.monotonic()
    return [connection for connection, (worker, _) in busy.items() if worker.deadline <= now]


def _start(prepare: Prepare, number: int) -> _Worker:
    # Not forked: a GPU that was used before cannot be used in a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(prepare, number, theirs), daemon=True)
    with _deaf_to_ctrl_c():
        process.start()
    theirs.close()
    return _Worker(process, ours, number)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started here never hears Ctrl-C, not even while it imports; this process does, afterwards."""
    resource_tracker.ensure_running()  # it lets the signal through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hand_out(worker: _Worker, waiting: deque, busy: Busy, limit: Callable[[Any], float]) -> None:
    if not waiting:
        _stop(worker)
        return
    task = waiting.popleft()
    with suppress(OSError):  # it may have died meanwhile; reading will say so
        worker.connection.send(task)
    busy[worker.connection] = (worker._replace(deadline=time.monotonic() + limit(task)), task)


def _collect(
    worker: _Worker, task: Any, prepare: Prepare, *, has_more: bool
) -> tuple[TaskOutcome, _Worker | None]:
    """Read a worker's answer; a new worker takes the place of a dead one while there is work."""
    try:
        answer = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        how = how_it_ended(worker.process)
        outcome = TaskOutcome(task, None, f"the process that worked on it was {how}.")
        return outcome, _start(prepare, worker.number) if has_more else None
    if isinstance(answer, UserError):
        _stop(worker)
        raise answer
    return TaskOutcome(task, answer, None), worker


def _end_overdue(
    worker: _Worker, task: Any, prepare: Prepare, *, has_more: bool
) -> tuple[TaskOutcome, _Worker | None]:
    worker.process.kill()  # what hangs in a library does not heed a request to end
    _stop(worker)
    outcome = TaskOutcome(task, None, "it took too long; the process that worked on it was ended.")
    return outcome, _start(prepare, worker.number) if has_more else None


def _stop(worker: _Worker) -> None:
    worker.process.terminate()
    worker.process.join()
    worker.connection.close()


def _serve(prepare: Prepare, number: int, connection: Connection) -> None:
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
        answer = work(task)
        try:
            connection.send(answer)
        except OSError:
            return
