"""Files that generate.py writes: checked before a long conversation, written whole or not at all."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import ConfigError
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.state_file import check_writable
from moshi_ttt.memory import KIND as MEMORY_KIND
from moshi_ttt.session import KIND as SESSION_KIND


def output_paths(path: Path, batch_size: int) -> list[Path]:
    """One recording, or `out-0.wav`, `out-1.wav`, … as Moshi names them."""
    if batch_size == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{row}{path.suffix}") for row in range(batch_size)]


def check_outputs(options: argparse.Namespace) -> None:
    """See that everything can be written, and that nothing but older outputs is overwritten.

    Raises:
        ConfigError: a name has the wrong ending, is given twice, or is that of a file to read.
        StateError: a file cannot be written, or exists and is something else.
    """
    if Path(options.output).suffix.lower() not in (".wav", ".json"):
        raise ConfigError(
            f"{options.output}: the output is a wav file, its name must end with .wav (or .json, for the "
            "words of a speech-to-text model)."
        )
    if options.report is not None and Path(options.report).suffix.lower() != ".json":
        raise ConfigError(f"--report: {options.report} is written as JSON, its name must end with .json.")
    outputs: list[tuple[Path | None, str | None, Path | None]]
    outputs = [(path, None, None) for path in output_paths(Path(options.output), options.batch_size)]
    outputs += [
        (options.report, None, None),
        (options.save_memory, MEMORY_KIND, options.load_memory),
        (options.save_session, SESSION_KIND, options.load_session),
    ]
    read = (options.input, options.load_memory, options.load_session)
    taken = {os.path.realpath(path) for path in read if path is not None}
    for path, kind, predecessor in outputs:
        if path is None:
            continue
        real = os.path.realpath(path)
        if real in taken and not (predecessor is not None and real == os.path.realpath(predecessor)):
            raise ConfigError(f"{path}: names another file of this command too; give each its own name.")
        taken.add(real)
        check_writable(path, kind=kind)


def check_kind_of_output(options: argparse.Namespace, *, speaks: bool) -> None:
    """See that the name of the output fits what the model makes.

    Raises:
        ConfigError: it does not.
    """
    suffix = Path(options.output).suffix.lower()
    if speaks and suffix != ".wav":
        raise ConfigError(f"{options.output}: this model speaks, the name of its output must end with .wav.")
    if not speaks and suffix != ".json":
        raise ConfigError(
            f"{options.output}: this model writes text only (dep_q: 0), words with times; the name of its "
            "output must end with .json."
        )


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """As `replacing`.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with replacing(path) as partial:
            yield partial
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be written: {reason}.") from None
