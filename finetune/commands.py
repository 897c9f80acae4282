"""What all command lines share: the parser, one-line errors with their exit status, and Ctrl-C."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from finetune import end_at_once
from finetune.errors import ConfigError, TrainingDivergedError, UserError, one_line, printable


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ConfigError where argparse prints its usage and exits.

    What is started through the installed command goes by that name, `moshi-ttt train` for `train.py`.
    """

    def __init__(self, *, prog: str, **settings: Any) -> None:
        started = sys.argv[0]
        if started.startswith("moshi-ttt ") and not prog.startswith(started):  # not a subcommand of it
            prog = started
        super().__init__(prog=prog, **settings)

    def error(self, message: str) -> NoReturn:
        """Called by argparse with what is wrong."""
        raise ConfigError(f"{message} (see --help).")


def run_command(command: Callable[[], int | None]) -> NoReturn:
    """Run a command line's main function and exit: errors of the user with one line and status 2."""
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        if sys.platform == "win32":
            raise UserError("moshi-ttt runs on Linux and macOS; on Windows, use it in WSL 2.")
        with _signals_as_exceptions():
            status = command() or 0
    except UserError as error:
        if str(error) and (is_first or not error.of_all):
            _print_error(error)
        status = 2
    except BrokenPipeError:
        status = _leave_closed_output()
    except OSError as error:
        # What no closer place foresaw: a path too long, a full disk, a file that may not be read.
        _print_error(f"{error.filename}: {error.strerror}." if error.filename is not None else error)
        status = 2
    except TrainingDivergedError as error:
        if is_first:
            _print_error(error)
        status = 1
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, _Terminated)
        if is_first:
            what = "terminated" if terminated else "interrupted"
            print(f"{what}: what had been saved before is kept.", file=sys.stderr)
        status = 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    sys.exit(status)


class _Terminated(KeyboardInterrupt):
    """Somebody asked this process to end by SIGTERM; it leaves like after Ctrl-C."""


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Context in which Ctrl-C and SIGTERM let every `finally` run: no process or half a file is left."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def loading() -> Iterator[None]:
    """Context in which a command's libraries are loaded, and Ctrl-C ends the process on the spot."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _print_error(error: object) -> None:
    """One line, whatever stands in the message: paths and files may hold anything."""
    print(f"error: {printable(one_line(error))}", file=sys.stderr)


def _leave_closed_output() -> int:
    """Nobody reads the output any more: end quietly, as other commands in a pipe do."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it at the very end
    return 141


class StopRequest:
    """Turns signals into a wish to stop; a second one of them stops at once.

    Attributes:
        requested: whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def on(self, *numbers: signal.Signals) -> Iterator[None]:
        """Context in which these signals ask to stop instead of what they do otherwise."""
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.requested = True
