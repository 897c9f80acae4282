"""sWUGGY and sBLIMP in the layout of the ZeroSpeech Challenge 2021.

What is paired and how follows the challenge's own scorers, `zerospeech2021/lexical.py` and `syntactic.py` of
https://github.com/zerospeech/zerospeech2021 and `tasks/lm` of https://github.com/zerospeech/benchmarks: rows
of `gold.csv` are read by the names of their columns, and a pair is a correct and an incorrect row of one id
and voice. Columns that they use: `filename, id, voice, correct`, with `frequency` (sWUGGY) or `type, subtype`
(sBLIMP).
"""

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.errors import DataError
from finetune.evaluation.spoken.items import Benchmark, Item, Pair, Split

logger = logging.getLogger(__name__)

Task = Literal["swuggy", "sblimp"]

GOLD_FILE = "gold.csv"
FOLDERS: dict[Task, str] = {"swuggy": "lexical", "sblimp": "syntactic"}
REQUIRED_COLUMNS = ("filename", "id", "voice", "correct")
SUBTYPE_COLUMNS: dict[Task, tuple[str, ...]] = {"swuggy": ("frequency",), "sblimp": ("type", "subtype")}
# Occurrences of a word in LibriSpeech, and the official name of the band that ends below. The names are as
# they are published, though a word that occurs 5 times is in the band called 6-20.
FREQUENCY_BANDS = ((1, "oov"), (5, "1-5"), (20, "6-20"), (100, "21-100"))
LAST_BAND = ">100"
CORRECT = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


@dataclass(frozen=True)
class _Row:
    """A line of gold.csv."""

    id: str
    voice: str
    subtype: str
    correct: bool
    item: Item


def load_zerospeech(folder: Path, task: Task, *, split: Split = "dev") -> Benchmark:
    """Reads a benchmark of the ZeroSpeech Challenge 2021, without a look into its audio.

    Ids of sBLIMP count within a subtype only, so a pair's id there is `type/subtype/id`. Subtypes are the
    official frequency bands of sWUGGY (`oov`, `1-5`, `6-20`, `21-100`, `>100`) and `type/subtype` of sBLIMP.
    Several rows of one id and voice are paired in the order of the file, or all with the only row of the
    other side.

    Args:
        folder: The data set (with `lexical/dev/gold.csv` and the wav files beside it), one of its task
            folders, or the folder of the split itself.
        task: `swuggy`, the folder `lexical`; or `sblimp`, `syntactic`.
        split: `dev` or `test`; the gold of `test` is not part of every release.

    Returns:
        The pairs in the order of `gold.csv`, named by file without `.wav`. Rows without a file or without a
        counterpart are failures.

    Raises:
        DataError: There is no such folder or gold, it is malformed, or no pair is complete.
    """
    folder = _find_split(Path(folder).expanduser(), task, split)
    gold = folder / GOLD_FILE
    rows = list(_read_gold(gold, task))
    if not rows:
        raise DataError(f"{gold}: has no rows; download it again.")
    present = _files(folder)
    _say_unknown_files(gold, rows, present)
    failures: dict[str, str] = {}
    groups: dict[tuple[str, str, str], list[_Row]] = {}
    for row in rows:
        # As the official scorers: sWUGGY by id and voice, sBLIMP by type and subtype too.
        subtype = row.subtype if task == "sblimp" else ""
        groups.setdefault((subtype, row.id, row.voice), []).append(row)
    pairs = [pair for group in groups.values() for pair in _pair(group, task, present, failures)]
    if not pairs:
        raise DataError(f"{gold}: no pair can be used, {len(failures)} rows failed: {_first(failures)}")
    return Benchmark(task, pairs, failures)


def _find_split(folder: Path, task: Task, split: Split) -> Path:
    name = FOLDERS[task]
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {problem}; give the data set with {name}/{split}/{GOLD_FILE} in it.")
    candidates = [folder / name / split, folder / split, folder]
    for place in candidates:
        if (place / GOLD_FILE).is_file():
            return _checked_place(place, task, split)
    without_gold = next((place for place in candidates[:2] if place.is_dir()), None)
    if without_gold is not None:
        why = "the test gold is not in every release, use the dev split" if split == "test" else "download it"
        raise DataError(f"{without_gold}: has no {GOLD_FILE}, which says what is correct; {why}.")
    raise DataError(f"{folder}: holds no {name}/{split}/{GOLD_FILE}; give the root of the data set.")


def _checked_place(place: Path, task: Task, split: Split) -> Path:
    names = {place.absolute().name, place.absolute().parent.name}
    for other in set(FOLDERS.values()) - {FOLDERS[task]}:
        if other in names and FOLDERS[task] not in names:
            raise DataError(f"{place}: is not {task}, whose folder is called {FOLDERS[task]}.")
    if place.absolute().name in {"dev", "test"} - {split}:
        raise DataError(f"{place}: is not the {split} split; give the folder above it.")
    return place


def _read_gold(path: Path, task: Task) -> Iterator[_Row]:
    seen: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            reader.fieldnames = _columns(path, reader.fieldnames, task)
            for fields in reader:
                row = _row(fields, path, reader.line_num, task)
                if row.item.name in seen:
                    raise DataError(
                        f"{path}: line {reader.line_num}: {row.item.name} is in line {seen[row.item.name]} "
                        "already."
                    )
                seen[row.item.name] = reader.line_num
                yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no csv file in UTF-8 ({error}); download it again.") from error


def _columns(path: Path, names: Sequence[str] | None, task: Task) -> list[str]:
    if not names:
        raise DataError(f"{path}: is empty; download it again.")
    columns = [name.strip().lower() for name in names]
    missing = [name for name in REQUIRED_COLUMNS if name not in columns]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns)}.")
    twice = sorted({name for name in columns if columns.count(name) > 1 and name in REQUIRED_COLUMNS})
    if twice:
        raise DataError(f"{path}: has several columns called {', '.join(twice)}.")
    for other, own in SUBTYPE_COLUMNS.items():
        if other != task and set(own) <= set(columns) and not set(SUBTYPE_COLUMNS[task]) & set(columns):
            raise DataError(f"{path}: is the gold of {other}, not of {task}: it has {', '.join(own)}.")
    return columns


def _row(fields: dict[str | None, str | None], path: Path, line: int, task: Task) -> _Row:
    where = f"{path}: line {line}"
    if None in fields or None in fields.values():
        raise DataError(f"{where}: has more or fewer fields than the header.")
    text = {name: value.strip() for name, value in fields.items() if name and value is not None}
    correct = CORRECT.get(text["correct"].lower())
    if correct is None:
        raise DataError(f'{where}: "correct" is {text["correct"]!r}; it is 1 or 0.')
    name = text["filename"].removesuffix(".wav")
    if not name or not text["id"]:
        raise DataError(f"{where}: has no {'filename' if not name else 'id'}.")
    item = Item(name, path.parent / f"{name}.wav")
    return _Row(text["id"], text["voice"], _subtype(text, task), correct, item)


def _subtype(text: dict[str, str], task: Task) -> str:
    if task == "sblimp":
        return "/".join(text[name] for name in SUBTYPE_COLUMNS[task] if text.get(name))
    try:
        frequency = float(text.get("frequency", ""))
    except ValueError:  # non-words have none in some releases
        return ""
    if not frequency >= 0:
        return ""
    return next((name for end, name in FREQUENCY_BANDS if frequency < end), LAST_BAND)


def _files(folder: Path) -> set[str]:
    try:
        return {name.removesuffix(".wav") for name in os.listdir(folder) if name.endswith(".wav")}
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}).") from error


def _say_unknown_files(gold: Path, rows: Sequence[_Row], present: set[str]) -> None:
    unknown = present - {row.item.name for row in rows}
    if unknown:
        logger.warning("%s: %d wav files are not in it and are left out.", gold, len(unknown))


def _pair(group: Sequence[_Row], task: Task, present: set[str], failures: dict[str, str]) -> Iterator[Pair]:
    sides = [row for row in group if row.correct], [row for row in group if not row.correct]
    if min(map(len, sides)) == 1:
        sides = tuple(side * (max(map(len, sides)) // len(side)) for side in sides)
    if len(sides[0]) != len(sides[1]):
        what = f"{len(sides[0])} correct and {len(sides[1])} incorrect rows"
        for row in group:
            failures[row.item.name] = f"has no counterpart: id {row.id}, voice {row.voice!r} has {what}"
        return
    for correct, incorrect in zip(*sides, strict=True):
        missing = [row.item for row in (correct, incorrect) if row.item.name not in present]
        for item in missing:
            failures[item.name] = f"{item.path} does not exist"
        if not missing:
            id_ = f"{correct.subtype}/{correct.id}" if task == "sblimp" else correct.id
            yield Pair(id_, correct.voice, correct.subtype, correct.item, incorrect.item)


def _first(failures: dict[str, str]) -> str:
    name, reason = next(iter(failures.items()))
    return f"{name}: {reason}."
