"""The work of `evaluate.py watch`: a measurement of each checkpoint of a run as it appears."""

import argparse
import gc
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from finetune.checkpoint.layout import DONE_FILE, list_checkpoints, step_of
from finetune.config_io import ARGS_FILE, read_yaml
from finetune.errors import ConfigError
from finetune.evaluation.out_folder import check_default, check_out
from finetune.evaluation.text_table import aligned
from finetune.evaluation.watch.record import Measured, Record
from finetune.files import hash_file, hash_json, rename_to_backup
from finetune.inference.options import positive_integer
from finetune.inference.terminal import say

__all__ = ["HELP", "add_options", "run"]

HELP = "a measurement of each checkpoint of a run as it appears, and which of them is best"
_OURS = ("--checkpoint", "--out")
_NO_MEASUREMENTS = ("trajectories", "watch")

Prepare = Callable[[Sequence[str]], Callable[[], None]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the run, the record and the score; the measurement has its own."""
    parser.add_argument("run_dir", metavar="RUN", help="run directory, whose training may still go on")
    parser.add_argument(
        "evaluation",
        nargs="+",
        metavar="MEASUREMENT",
        help="after --: another measurement with its options, but --checkpoint and --out",
    )
    parser.add_argument(
        "--score",
        metavar="KEY",
        help="of results.json, by which one is best, such as scores.swuggy or scores.on.loss (none is)",
    )
    parser.add_argument("--lower-is-better", action="store_true", help="of the score, such as a loss")
    parser.add_argument(
        "--once", action="store_true", help="measure the checkpoints that there are, and do not wait for more"
    )
    parser.add_argument(
        "--poll-sec",
        type=positive_integer,
        default=30,
        metavar="N",
        help="seconds between two looks for new checkpoints (%(default)s)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder of the record and all results (evaluation/watch/… in RUN)"
    )


def run(options: argparse.Namespace, *, prepare: Prepare, resumable: Collection[str]) -> None:
    """Measure checkpoints until the run has made its last one.

    Args:
        options: of the command line.
        prepare: parses the command line of a measurement and returns what does it.
        resumable: measurements that go on in a folder of an unfinished one.

    Raises:
        UserError: an option or a file cannot be used, or a measurement cannot be made.
    """
    _Watch(options, prepare, resumable).run()


class _Watch:
    """See `run`."""

    def __init__(self, options: argparse.Namespace, prepare: Prepare, resumable: Collection[str]) -> None:
        self._run_dir = Path(options.run_dir)
        self._measurement, self._score = options.evaluation, options.score
        self._once, self._poll_sec = options.once, options.poll_sec
        self._prepare = prepare
        self._is_resumable = self._measurement[0] in resumable
        self._check(options)
        facts = {
            "run": os.path.abspath(self._run_dir),
            "measurement": list(self._measurement),
        }
        folder = Path(options.out) if options.out is not None else self._default_folder(facts)
        self._record = Record(folder, facts, score=self._score, lower_is_better=options.lower_is_better)

    def run(self) -> None:
        say(f"results: {self._record.folder}")
        is_waiting = False
        while True:
            found = next(iter(self._todo()), None)
            if found is not None:
                self._measure(*found)
                is_waiting = False
                continue
            if self._once or self._is_finished():
                break
            if not is_waiting:
                say(f"waiting for checkpoints of {self._run_dir}; Ctrl-C ends it, a later start goes on")
                is_waiting = True
            time.sleep(self._poll_sec)
        for line in self._table():
            say(line)

    def _check(self, options: argparse.Namespace) -> None:
        if not self._run_dir.is_dir():
            raise ConfigError(f"{self._run_dir}: is no run directory; give the run_dir of a training.")
        if self._measurement[0] in _NO_MEASUREMENTS:
            raise ConfigError(f"{self._measurement[0]}: cannot be watched, it measures no checkpoint.")
        for option in _OURS:
            if any(word == option or word.startswith(f"{option}=") for word in self._measurement):
                raise ConfigError(f"{option}: watch gives it to the measurement itself; leave it out.")
        check_out(options.out)
        if not self._once:
            self._max_steps()
        # What is wrong with the measurement's options is said now, not when the first checkpoint comes.
        self._prepare([*self._measurement, "--checkpoint", str(self._run_dir), "--out", "unused"])

    def _default_folder(self, facts: Mapping[str, object]) -> Path:
        name = f"{self._measurement[0]}-{hash_json(facts)[:8]}"
        folder = self._run_dir / "evaluation" / "watch" / name
        check_default(folder)
        return folder

    def _todo(self) -> list[tuple[Path, str]]:
        """Checkpoints that have not been measured and the digests of their lists of files, oldest first."""
        todo = []
        for path in list_checkpoints(self._run_dir / "checkpoints"):
            try:
                digest = hash_file(path / DONE_FILE)
            except OSError:  # it is being deleted
                continue
            if not self._record.has(path.name, digest):
                todo.append((path, digest))
        return todo

    def _measure(self, checkpoint: Path, digest: str) -> None:
        folder = self._record.folder / f"{checkpoint.name}-{digest[:8]}"
        if folder.exists() and not self._is_resumable:
            say(
                f"{folder}: is of a measurement that was interrupted, kept as {rename_to_backup(folder).name}"
            )
        say(f"\n{checkpoint.name}:")
        start = time.perf_counter()
        places = ["--checkpoint", str(checkpoint), "--out", str(folder)]
        try:
            self._prepare([*self._measurement, *places])()
        except Exception:
            if checkpoint.is_dir():
                raise
            say(f"{checkpoint.name}: was deleted by its run while it was read; it is left out")
            return
        finally:
            gc.collect()  # the model, before the next one is loaded
        step = step_of(checkpoint)
        assert step is not None  # by how it was found
        seconds = time.perf_counter() - start
        measured = self._record.add(Measured(checkpoint.name, step, digest, folder.name, seconds))
        self._say_best(measured.score)

    def _say_best(self, score: float | None) -> None:
        if self._score is None:
            return
        best = self._record.best()
        shown = "has no value" if score is None else f"{score:.4f}"
        so_far = "none yet" if best is None else f"{best.score:.4f} at step {best.step}"
        say(f"{self._score}: {shown}, best so far: {so_far}")

    def _is_finished(self) -> bool:
        """Whether the last checkpoint of the run has been measured."""
        steps = [each.step for each in self._record.measured]
        return bool(steps) and max(steps) >= self._max_steps()

    def _max_steps(self) -> int:
        path = self._run_dir / ARGS_FILE
        if not path.is_file():
            raise ConfigError(
                f"{path}: does not exist, so nothing says when the run ends; --once measures what is there."
            )
        value = read_yaml(path).get("max_steps", 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{path}: max_steps: {value!r} is not a number of steps.")
        return value

    def _table(self) -> list[str]:
        if not self._record.measured:
            return ["no checkpoint is there yet"]
        best = self._record.best()
        table = [["checkpoint", self._score or "", "seconds", "results"]]
        for each in sorted(self._record.measured, key=lambda measured: measured.step):
            score = "" if self._score is None else "—" if each.score is None else f"{each.score:.4f}"
            mark = " best" if each == best else ""
            table.append([f"{each.name}{mark}", score, f"{each.seconds:.0f}", each.folder])
        return ["", *aligned(table)]
