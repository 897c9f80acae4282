"""The folders of Full-Duplex-Bench: a set of samples per task, a sample per folder.

    candor_pause_handling/<id>/input.wav  pause.json
    candor_turn_taking/<id>/input.wav  turn_taking.json
    synthetic_user_interruption/<id>/input.wav  interrupt.json
    icc_backchannel/<id>/input.wav
    user_interruption, user_backchannel, talking_to_other, background_speech/<id>/input.wav  metadata.json

A model's answer to `input.wav` is `output.wav` beside it, its words are in `output.json`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.words import Word
from finetune.errors import DataError, printable
from finetune.evaluation.duplex.figures import Annotation
from finetune.evaluation.duplex.speech import Interval
from finetune.files import read_json_object, read_regular

INPUT_FILE = "input.wav"
OUTPUT_FILE = "output.wav"
WORDS_FILE = "output.json"
DISTRIBUTION_FILE = "icc_gt_distribution.json"
# A part of a set's name: its task. The first that fits counts.
_NAMES = {
    "user_backchannel": "user_backchannel",
    "talking_to_other": "talking_to_other",
    "background_speech": "background_speech",
    "pause_handling": "pause_handling",
    "turn_taking": "smooth_turn_taking",
    "user_interruption": "user_interruption",
    "backchannel": "backchannel",
}
_EVENTS = {
    "pause_handling": ("pause.json",),
    "smooth_turn_taking": ("turn_taking.json",),
    "user_interruption": ("interrupt.json", "metadata.json"),
    "user_backchannel": ("metadata.json",),
    "talking_to_other": ("metadata.json",),
    "background_speech": ("metadata.json",),
    "backchannel": (),
}


@dataclass(frozen=True)
class Sample:
    """One recording of a user.

    Attributes:
        set_name: of its set.
        id: the name of its folder.
        folder: with the recording and what is known of it.
    """

    set_name: str
    id: str
    folder: Path

    @property
    def name(self) -> str:
        """What no other sample is called."""
        return f"{self.set_name}/{self.id}"

    @property
    def place(self) -> str:
        """The relative path of what belongs to it in a folder of all sets."""
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True)
class SampleSet:
    """The samples of one folder.

    Attributes:
        name: of the folder.
        task: one of `TASKS`.
        samples: by id, numbers in their order.
        distributions: of people's backchannels, by id; empty where no file gives them.
    """

    name: str
    task: str
    samples: tuple[Sample, ...]
    distributions: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def find_sets(
    data: Path, *, task: str | None = None, distribution: Path | None = None
) -> tuple[list[SampleSet], list[str]]:
    """List the samples of a set, or of all sets of a folder.

    Args:
        data: the folder of a set, or a folder of such folders.
        task: of all sets; None: their names say it.
        distribution: JSON with lists of numbers by id, for sets of the task backchannel; None: the
            benchmark's own file in a set or in `data`, where there is one.

    Returns:
        The sets by name, and the names of folders that are left out because their names say no task.

    Raises:
        DataError: there is no set, or a file is malformed.
    """
    if not data.is_dir():
        raise DataError(f"--data: {data} is not a folder.")
    data = Path(os.path.abspath(data))  # of `.` the name says nothing
    folders = [data] if _is_set(data) else [folder for folder in _folders(data) if _is_set(folder)]
    if not folders:
        raise DataError(
            f"--data: {data} holds no samples: no folder in it, nor in those folders, has an {INPUT_FILE} or "
            f"{OUTPUT_FILE}."
        )
    sets, left_out = [], []
    for folder in folders:
        name = printable(folder.name)
        found = task or next((kind for part, kind in _NAMES.items() if part in name.lower()), None)
        if found is None:
            left_out.append(name)
            continue
        samples = tuple(Sample(name, printable(each.name), each) for each in _folders(folder))
        distributions = _distributions(distribution, folder, data) if found == "backchannel" else {}
        sets.append(SampleSet(name, found, samples, distributions))
    if not sets:
        raise DataError(
            f"--data: the names {', '.join(left_out)} say no task; rename them, or give --task. A name has "
            f"one of {', '.join(_NAMES)}."
        )
    return sets, left_out


def read_annotation(sample: Sample, samples: SampleSet) -> Annotation:
    """What the user does in a sample.

    Raises:
        DataError: its file is missing or malformed; the message names it.
    """
    if samples.task == "backchannel":
        if samples.distributions and sample.id not in samples.distributions:
            raise DataError(f"{sample.name}: the distribution of backchannels has no entry {sample.id!r}.")
        return Annotation(distribution=samples.distributions.get(sample.id))
    names = _EVENTS[samples.task]
    path = next((sample.folder / name for name in names if (sample.folder / name).exists()), None)
    if path is None:
        raise DataError(f"{sample.folder}: has no {' or '.join(names)}, which says what the user does.")
    if path.name == "metadata.json":
        spans = [read_json_object(path, error=DataError).get("timestamps")]
    else:
        content = _read_json(path)
        entries = content if isinstance(content, list) else []
        spans = [entry.get("timestamp") if isinstance(entry, dict) else None for entry in entries]
    if not spans:
        raise DataError(f'{path}: expected a list of {{"timestamp": [start_sec, end_sec]}}, at least one.')
    return Annotation(events=tuple(_interval(span, path) for span in spans))


def read_words(path: Path) -> list[Word]:
    """The words of an `output.json`: a recogniser's for the benchmark, or a model's own text.

    Raises:
        DataError: it is missing or malformed.
    """
    chunks = read_json_object(path, error=DataError).get("chunks")
    if not isinstance(chunks, list):
        raise DataError(f'{path}: has no list "chunks" of words.')
    words = []
    for chunk in chunks:
        text = chunk.get("text") if isinstance(chunk, dict) else None
        span = chunk.get("timestamp") if isinstance(chunk, dict) else None
        if not isinstance(text, str) or not isinstance(span, list) or len(span) != 2:
            raise DataError(f'{path}: expected {{"text": …, "timestamp": [start_sec, end_sec]}} in "chunks".')
        start, end = span
        interval = _interval([start, start if end is None else end], path)  # an open end is at its start
        words.append(Word(text.strip(), interval.start_sec, interval.end_sec))
    return words


def _is_set(folder: Path) -> bool:
    return any((sample / name).exists() for sample in _folders(folder) for name in (INPUT_FILE, OUTPUT_FILE))


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder but hidden ones: numbers in their order, then names."""
    try:
        found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}.") from None
    return sorted(found, key=lambda path: (not path.name.isdecimal(), _number(path.name), path.name))


def _number(name: str) -> int:
    return int(name) if name.isdecimal() else 0


def _distributions(given: Path | None, folder: Path, data: Path) -> dict[str, tuple[float, ...]]:
    candidates = [given] if given is not None else [folder / DISTRIBUTION_FILE, data / DISTRIBUTION_FILE]
    path = next((path for path in candidates if given is not None or path.is_file()), None)
    if path is None:
        return {}
    content = read_json_object(path, error=DataError)
    for name, values in content.items():
        usable = isinstance(values, list) and len(values) > 1 and all(_is_time(value) for value in values)
        if not usable or sum(values) <= 0:
            raise DataError(f"{path}: {name!r} is not a list of shares, two or more that are not all 0.")
    return {name: tuple(map(float, values)) for name, values in content.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path).decode("utf-8-sig"))
    except OSError as problem:
        raise DataError(f"{path}: cannot be read: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not valid JSON: {problem}.") from None


def _interval(span: object, path: Path) -> Interval:
    if (
        isinstance(span, list)
        and len(span) == 2
        and all(_is_time(value) for value in span)
        and span[0] <= span[1]
    ):
        return Interval(float(span[0]), float(span[1]))
    raise DataError(f"{path}: {json.dumps(span)[:80]} is not a timestamp [start_sec, end_sec].")


def _is_time(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= float(value) < math.inf  # type: ignore[arg-type]
