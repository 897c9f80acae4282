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
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finetune.errors import DataError
from finetune.evaluation.spoken.items import Benchmark, Item, Pair, Split
from moshi_ttt.files.regular_file import regular_only

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
    """Read a benchmark of the ZeroSpeech Challenge 2021, without a look into its audio.

    Ids of sBLIMP count within a subtype only, so a pair's id there is `type/subtype/id`. Subtypes are the
    official frequency bands of sWUGGY (`oov`, `1-5`, `6-20`, `21-100`, `>100`) and `type/subtype` of sBLIMP.
    Several rows of one id and voice are paired in the order of the file, or all with the only row of the
    other side.

    Args:
        folder: the data set (with `lexical/dev/gold.csv` and the wav files beside it), one of its task
            folders, or the folder of the split itself.
        task: `swuggy`, the folder `lexical`; or `sblimp`, `syntactic`.
        split: `dev` or `test`; the gold of `test` is not part of every release.

    Returns:
        The pairs in the order of `gold.csv`, named by file without `.wav`; those whose files do not exist are
        among them and fail when they are read. A file is also found when its name differs in case or Unicode
        form. Rows without a counterpart are failures.

    Raises:
        DataError: there is no such folder or gold, it is malformed, or no pair has both files.
    """
    folder = _find_split(Path(folder).expanduser(), task, split)
    gold = folder / GOLD_FILE
    rows = list(_read_gold(gold, task))
    if not rows:
        raise DataError(f"{gold}: has no rows; download it again.")
    files = _find_files(folder)
    rows = _locate(rows, files)
    _say_unknown_files(gold, rows, files)
    failures: dict[str, str] = {}
    failed_ids: dict[str, str] = {}
    pairs: list[Pair] = []
    for id_, group in _by_id_and_voice(rows, task):
        sides = _sides(group)
        if sides is None:
            counts = sum(row.correct for row in group), sum(not row.correct for row in group)
            what = f"{counts[0]} correct and {counts[1]} incorrect rows"
            for row in group:
                failures[row.item.name] = f"has no counterpart: id {row.id}, voice {row.voice!r} has {what}"
                failed_ids[row.item.name] = id_
        else:
            pairs += [Pair(id_, a.voice, a.subtype, a.item, b.item) for a, b in zip(*sides, strict=True)]
    _check_any(gold, pairs, failures)
    return Benchmark(task, pairs, failures, failed_ids)


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
        with open(path, encoding="utf-8-sig", newline="", opener=regular_only) as file:
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
    for other, own in SUBTYPE_COLUMNS.items():
        if other != task and set(own) <= set(columns) and not set(SUBTYPE_COLUMNS[task]) & set(columns):
            raise DataError(f"{path}: is the gold of {other}, not of {task}: it has {', '.join(own)}.")
    # Ids of sBLIMP count within a subtype: without it, sentences of several would count as one.
    required = REQUIRED_COLUMNS + (SUBTYPE_COLUMNS[task] if task == "sblimp" else ())
    missing = [name for name in required if name not in columns]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(columns)}.")
    twice = sorted({name for name in columns if columns.count(name) > 1 and name in required})
    if twice:
        raise DataError(f"{path}: has several columns called {', '.join(twice)}.")
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
    empty = [column for column in SUBTYPE_COLUMNS["sblimp"] if task == "sblimp" and not text[column]]
    if empty:
        raise DataError(f"{where}: has no {' and no '.join(empty)}.")
    item = Item(name, path.parent / f"{name}.wav")
    return _Row(text["id"], text["voice"], _subtype(text, task), correct, item)


def _subtype(text: dict[str, str], task: Task) -> str:
    if task == "sblimp":
        return "/".join(text[name] for name in SUBTYPE_COLUMNS[task])
    try:
        frequency = float(text.get("frequency", ""))
    except ValueError:  # non-words have none in some releases
        return ""
    if not frequency >= 0:
        return ""
    return next((name for end, name in FREQUENCY_BANDS if frequency < end), LAST_BAND)


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """The wav files below a folder by their normal name, see `_normal`."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}).") from error

    files: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_link_up(place, name)]
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() == ".wav":
                relative = path.relative_to(folder).with_suffix("").as_posix()
                files.setdefault(_normal(relative), []).append(path)
    return files


def _is_link_up(place: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, which would be entered again and again."""
    path = os.path.join(place, name)
    return os.path.islink(path) and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(path))


def _normal(name: str) -> str:
    """What names have in common that differ in case or in how Unicode writes an accent."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _locate(rows: Sequence[_Row], files: Mapping[str, Sequence[Path]]) -> list[_Row]:
    """Rows with the file of exactly their name, else with the only one whose name is nearly the same."""
    counts = Counter(_normal(row.item.name) for row in rows)
    located = []
    for row in rows:
        name = _normal(row.item.name)
        found = files.get(name, ())
        only = counts[name] == len(found) == 1
        located.append(replace(row, item=replace(row.item, path=found[0])) if only else row)
    return located


def _say_unknown_files(gold: Path, rows: Sequence[_Row], files: Mapping[str, Sequence[Path]]) -> None:
    unknown = {path for paths in files.values() for path in paths} - {row.item.path for row in rows}
    if unknown:
        logger.warning("%s: %d wav files are not in it and are left out.", gold, len(unknown))


def _by_id_and_voice(rows: Sequence[_Row], task: Task) -> Iterator[tuple[str, list[_Row]]]:
    """Yield the id of pairs and its rows of one voice, as the official scorers group them."""
    groups: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        id_ = f"{row.subtype}/{row.id}" if task == "sblimp" else row.id
        groups.setdefault((id_, row.voice), []).append(row)
    for (id_, _), group in groups.items():
        yield id_, group


def _sides(group: Sequence[_Row]) -> tuple[list[_Row], list[_Row]] | None:
    """Correct and incorrect rows that belong together, in order; None where their numbers do not allow it."""
    correct, incorrect = [row for row in group if row.correct], [row for row in group if not row.correct]
    if min(len(correct), len(incorrect)) == 1:
        most = max(len(correct), len(incorrect))
        correct, incorrect = correct * (most // len(correct)), incorrect * (most // len(incorrect))
    return (correct, incorrect) if len(correct) == len(incorrect) else None


def _check_any(gold: Path, pairs: Sequence[Pair], failures: Mapping[str, str]) -> None:
    """Refuse, before a model is loaded, a benchmark of which nothing can be measured."""
    missing = {
        item.name: f"{item.path} does not exist"
        for pair in pairs
        for item in (pair.correct, pair.incorrect)
        if not item.path.exists()
    }
    if all({pair.correct.name, pair.incorrect.name} & missing.keys() for pair in pairs):
        failed = {**missing, **failures}
        name, reason = next(iter(failed.items()))
        raise DataError(f"{gold}: no pair can be used, {len(failed)} rows failed: {name}: {reason}.")
