"""Run train.py with a trouble that comes in its third step: TROUBLE [ARGUMENT ...].

What a run does to itself could not be timed from outside. Tests use the troubles in their own process too.
"""

import errno
import multiprocessing
import os
import shutil
import signal
import sys

from finetune import checkpointing
from finetune.commands import run_command
from finetune.training.command import train
from finetune.training.trainer import Trainer

STEPS_BEFORE = 2


def full_disk(trainer: Trainer) -> None:
    """No checkpoint can be written any more."""

    def write_json(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpointing.write_json = write_json


def lost_codes(trainer: Trainer) -> None:
    """The folder of codes is gone."""
    if os.environ.get("RANK", "0") == "0":
        shutil.rmtree(trainer.args.data.cache_dir)


def lost_worker(trainer: Trainer) -> None:
    """The kernel ends the loader's processes, as it does when memory is short."""
    if os.environ.get("RANK", "1") == "1":
        for process in multiprocessing.active_children():
            process.kill()


def lost_rank(trainer: Trainer) -> None:
    """The kernel ends the first rank."""
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def divergence(trainer: Trainer) -> None:
    """The weights are no longer numbers."""
    for parameter in trainer.trainable:
        parameter.data.fill_(float("nan"))


def two_interrupts(trainer: Trainer) -> None:
    """Ctrl-C twice, which reaches the loader's processes too."""
    for _ in range(2):
        for pid in [*(process.pid for process in multiprocessing.active_children()), os.getpid()]:
            os.kill(pid, signal.SIGINT)


def two_requests_to_end(trainer: Trainer) -> None:
    """SIGTERM twice, to all processes of the job."""
    for _ in range(2):
        for pid in [*(process.pid for process in multiprocessing.active_children()), os.getpid()]:
            os.kill(pid, signal.SIGTERM)


def with_trouble(name: str):
    """`Trainer._train_step` with the trouble of a name."""
    original = Trainer._train_step

    def step(self, batches):
        if self.step == STEPS_BEFORE:
            globals()[name](self)
        return original(self, batches)

    return step


if __name__ == "__main__":
    Trainer._train_step = with_trouble(sys.argv[1])
    run_command(lambda: train(sys.argv[2:]))
