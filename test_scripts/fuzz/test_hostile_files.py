"""Damaged files of every kind that a stranger may hand over: a line or success, soon, in little memory."""

import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest
from mutations import mutate
from readers import Samples

from finetune.commands import run_command

MAX_SEC = 60
MAX_GROWTH = 1 << 30  # bytes
KINDS = (
    *("memory", "session", "export", "merged", "adapters", "base", "run", "configuration", "manifest"),
    *("words", "wav", "flac", "opus", "tokenizer", "codes"),
)
IN_SECONDS = ("memory", "words", "wav", "configuration", "manifest", "tokenizer", "codes")


@pytest.fixture(scope="module")
def samples(tmp_path_factory, demo, tiny_base, untrained_run):
    return Samples(tmp_path_factory.mktemp("good"), demo, tiny_base, untrained_run)


def _current_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _run(work: Callable[[], object]) -> str:
    """What is wrong with a piece of work, done as a command in a process of its own; empty: nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(silent, stream)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends here
        problem = ""
        before = _current_bytes()
        try:
            run_command(lambda: work() and None)
        except SystemExit as exit_:
            if exit_.code not in (0, 2):
                problem = f"exit status {exit_.code}"
        except BaseException:
            problem = traceback.format_exc()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if growth > MAX_GROWTH:
            problem += f"grew by {growth / 2**30:.1f} GiB"
        os.write(writing, problem.encode(errors="replace")[-4000:])
        os._exit(0)
    os.close(writing)
    start = time.monotonic()
    ended, _, _ = select.select([reading], [], [], MAX_SEC)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    problem = b"" if not ended else os.read(reading, 8000)
    os.close(reading)
    if not ended:
        return f"still running after {time.monotonic() - start:.0f} s"
    if status != 0:
        return f"ended by signal {status}"
    return problem.decode()


def _problems(samples: Samples, kind: str, seeds: range, tmp_path) -> list[str]:
    found = []
    for seed in seeds:
        draw = random.Random(f"{kind} {seed}")
        folder = tmp_path / f"{kind}{seed}" / "checkpoint"
        folder.parent.mkdir()
        samples.make(kind, folder)
        file = draw.choice(samples.kinds[kind].files)
        way = mutate(folder / file, draw)
        problem = _run(lambda: samples.kinds[kind].read(folder))  # noqa: B023 - called at once
        if problem:
            found.append(f"{kind} {seed}: {file}, {way}: {problem}")
    return found


@pytest.mark.parametrize("kind", IN_SECONDS)
def test_a_damaged_file_is_one_line(samples, tmp_path, kind):
    """A few of the long test, those that take a second together."""
    good = tmp_path / "good"
    samples.make(kind, good)
    assert _run(lambda: samples.kinds[kind].read(good)) == ""
    assert _problems(samples, kind, range(3), tmp_path) == []


def test_what_the_search_looks_for_it_finds():
    assert "ZeroDivisionError" in _run(lambda: 1 / 0)
    assert "grew by" in _run(lambda: len(bytearray(MAX_GROWTH + (100 << 20))))
    assert "signal" in _run(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert _run(lambda: sys.exit(2)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_damaged_files_end_in_a_line_or_well(samples, tmp_path, kind):
    assert sum(each.number for each in samples.kinds.values()) >= 300 and set(samples.kinds) == set(KINDS)
    samples.make(kind, tmp_path / "good")
    assert _run(lambda: samples.kinds[kind].read(tmp_path / "good")) == ""
    first = int(os.environ.get("FUZZ_FROM", 0))  # for more of them than the three hundred
    found = _problems(samples, kind, range(first, first + samples.kinds[kind].number), tmp_path)
    assert not found, "\n".join(found)
