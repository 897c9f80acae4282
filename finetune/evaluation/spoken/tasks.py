"""The benchmarks that there are, and where they lie below a folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.errors import DataError
from finetune.evaluation.spoken.items import Benchmark, Split
from finetune.evaluation.spoken.storycloze import load_storycloze
from finetune.evaluation.spoken.zerospeech import load_zerospeech


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: its key in results, the field's name for it.
        title: for people.
        folders: below the data folder, the first that exists is taken.
        load: from that folder and a split.
        submission: folder of the ZeroSpeech challenge's submissions that takes its scores, None outside it.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    load: Callable[[Path, Split], Benchmark]
    submission: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task(
            "swuggy",
            "sWUGGY: a word against a non-word",
            ("lexical",),
            lambda folder, split: load_zerospeech(folder, "swuggy", split=split),
            "lexical",
        ),
        Task(
            "sblimp",
            "sBLIMP: a grammatical sentence against one that is not",
            ("syntactic",),
            lambda folder, split: load_zerospeech(folder, "sblimp", split=split),
            "syntactic",
        ),
        Task(
            "tstory",
            "topic StoryCloze: the ending of a story against that of another",
            ("tstory", "tStoryCloze", "tSC"),
            lambda folder, split: load_storycloze(folder, "tstory", split=split),
        ),
        Task(
            "sstory",
            "spoken StoryCloze: the right ending of a story against the wrong one",
            ("sstory", "sStoryCloze", "sSC"),
            lambda folder, split: load_storycloze(folder, "sstory", split=split),
        ),
    )
}


class Found(NamedTuple):
    """Folders of benchmarks by task, and why there is none of the other tasks."""

    folders: dict[str, Path]
    absent: dict[str, str]


def find_tasks(data: Path, names: Sequence[str] = ()) -> Found:
    """The benchmarks below a folder.

    Args:
        data: a folder with `lexical/`, `syntactic/`, `tstory/` and `sstory/`, or some of them.
        names: all of these must be there; without any: what there is.

    Raises:
        DataError: one that is asked for is missing, or there is none at all.
    """
    _check_folder(data, names or TASKS)
    folders, absent = {}, {}
    for name in names or TASKS:
        folder = _below(data, name)
        if folder is None:
            absent[name] = f"{data} has no folder {_expected([name])}"
        else:
            folders[name] = folder
    if not folders or (names and absent):
        raise DataError(f"{data}: has no folder {_expected(absent)}.")
    return Found(folders, absent)


def find_task(data: Path, name: str) -> Path:
    """The folder of one benchmark: below a folder, or that folder itself.

    Raises:
        DataError: it is no folder, or one of other benchmarks.
    """
    _check_folder(data, [name])
    folder = _below(data, name)
    own_name = data.absolute().name.lower()
    for other in TASKS.keys() - {name}:
        if folder is None and own_name in map(str.lower, TASKS[other].folders):
            raise DataError(f"{data}: is not {name}: folders of this name hold {other}; rename it if not.")
    if folder is None and any(_below(data, other) is not None for other in TASKS):
        raise DataError(f"{data}: has no folder {_expected([name])}.")
    return folder or data


def _below(data: Path, name: str) -> Path | None:
    places = (data / folder for folder in TASKS[name].folders)
    return next((place for place in places if place.is_dir()), None)


def _check_folder(data: Path, names: Iterable[str]) -> None:
    if not data.is_dir():
        problem = "is not a folder" if data.exists() else "does not exist"
        raise DataError(f"{data}: {problem}; give a folder with {_expected(names)}.")


def _expected(names: Iterable[str]) -> str:
    return ", ".join(" or ".join(f"{folder}/" for folder in TASKS[name].folders) for name in names)
