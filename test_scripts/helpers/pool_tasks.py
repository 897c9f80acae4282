"""What workers do in tests of the pool; other processes import it, so it imports little."""

import os
import signal
import time

from finetune.errors import UserError


def make_worker(_number: int):
    """Do tasks by name."""

    def work(task: str) -> str | None:
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while task == "hang":
            time.sleep(60)
        return "fail failed" if task == "fail" else None

    return work


def say_what_is_blocked(_number: int):
    """Its tasks do nothing but return the signals that do not reach this process."""
    return lambda _task: signal.pthread_sigmask(signal.SIG_BLOCK, ())


def refuse_to_start(_number: int):
    """As an engine whose package is missing."""
    raise UserError("it is not installed")
