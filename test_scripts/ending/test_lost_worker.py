"""A loader process that is lost is told from other troubles, however slowly it ends."""

import multiprocessing
import os
import signal
import time

import pytest

from finetune.data.batches.loader import _next
from finetune.errors import UserError

CONNECTION_FAULTS = (ConnectionResetError(104, "Connection reset by peer"), EOFError(), RuntimeError("lost"))


def end_slowly() -> None:
    """Close all files, as the kernel does first when it ends a process, and end later."""
    os.closerange(3, 1024)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def failing(fault: Exception):
    raise fault
    yield  # makes it a generator


@pytest.mark.parametrize("fault", CONNECTION_FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_process_that_closed_its_files_but_has_not_ended_is_waited_for(fault):
    worker = multiprocessing.get_context("fork").Process(target=end_slowly)
    worker.start()
    with pytest.raises(UserError, match="a process that loads data was killed by signal 9"):
        _next(failing(fault), [worker])


def test_a_fault_while_all_processes_live_is_raised_as_it_is():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        with pytest.raises(ConnectionResetError):
            _next(failing(CONNECTION_FAULTS[0]), [worker])
    finally:
        worker.kill()
        worker.join()
