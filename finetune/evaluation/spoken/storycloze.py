"""Topic StoryCloze and Spoken StoryCloze.

The releases of https://github.com/slp-rl/SpokenStoryCloze hold one wav file per story and ending, called
`<number of the file>_<number of the story>_correct.wav` or `…_incorrect.wav`. Those who score them pair by
the story (`eval_tsc` of https://github.com/nicolvisser/ZeroSyl) or take files in the order of the first
number, two by two, the correct one first (`slamkit/metric/modelling_metric.py` of
https://github.com/slp-rl/slamkit), which is the same for the release. Here names say what they can, and
the order counts only where no name says what is correct.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Literal, NamedTuple, get_args

from finetune.errors import DataError
from finetune.evaluation.sources import scan_folder
from finetune.evaluation.spoken.items import Benchmark, Item, Pair, Split

logger = logging.getLogger(__name__)

StoryName = Literal["tstory", "sstory"]

_MARKED = re.compile(r"^(?P<rest>.*?)[_-]?(?P<mark>correct|incorrect)$", re.IGNORECASE)
_NUMBER = re.compile(r"^(?P<number>\d+)(?:[_-](?P<rest>.*))?$")


class _File(NamedTuple):
    item: Item
    folder: str
    stem: str  # without the mark
    correct: bool | None  # None: the name does not say


_Groups = dict[tuple[str, str], tuple[_File, _File]]  # by folder and key: a correct and an incorrect file
_BY_NAME, _BY_NUMBER = "the rest of their names", "the number in front"
_WAYS: dict[str, Callable[[_File], str | None]] = {
    _BY_NAME: lambda file: file.stem,
    _BY_NUMBER: lambda file: _part(file.stem, "number"),
    "their names without the number in front": lambda file: _part(file.stem, "rest"),
}


def load_storycloze(folder: Path, name: StoryName, *, split: Split = "dev") -> Benchmark:
    """Find the pairs of a StoryCloze folder at any depth, without a look into the audio.

    Files are paired within a folder. When names end with `correct` and `incorrect`, they are paired by the
    rest of the name, by the number in front, or by the rest without that number, as the release needs it;
    files with neither ending are failures. When no name has such an ending, files are paired by the number in
    front: in one folder the numbers are consecutive from 0 or 1, and each correct file is followed by its
    incorrect one. Files called `…_mutual`, the shared beginning of a story, are left out. The way taken is
    logged.

    Args:
        folder: with audio files, for example `tSC` or `sSC`; or with folders `dev` and `test` of them.
        name: of the benchmark.
        split: which of `dev` and `test`, where there are such folders.

    Returns:
        The pairs sorted by name, named by path relative to the folder without suffix. Files without a
        counterpart are failures.

    Raises:
        DataError: the folder cannot be used, there is no pair in it, or names pair in more than one way.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {problem}; give the folder with the wav files of {name}.")
    folder = _split_folder(folder, split)
    files = [_file(source.name, source.path) for source in scan_folder(folder)]
    files = [file for file in files if not file.stem.lower().endswith("mutual")]
    failures = _same_names(files)
    files = [file for file in files if file.item.name not in failures]
    if any(file.correct is not None for file in files):
        pairs = list(_pair_marked(folder, files, failures))
    else:
        pairs = list(_pair_numbered(folder, files, failures))
    if not pairs:
        raise DataError(
            f"{folder}: holds no pair; names must end with _correct and _incorrect, or start with "
            "consecutive numbers."
        )
    return Benchmark(name, pairs, failures)


def _split_folder(folder: Path, split: str) -> Path:
    splits = [each for each in get_args(Split) if (folder / each).is_dir()]
    if not splits:
        return folder
    if split not in splits:
        raise DataError(
            f"{folder}: has a folder {splits[0]} and none called {split}; choose that split or rename it."
        )
    logger.info("%s: only %s/ is read.", folder, split)
    return folder / split


def _file(name: str, path: Path) -> _File:
    relative = PurePath(name).with_suffix("")
    marked = _MARKED.match(relative.name)
    item = Item(relative.as_posix(), path)
    if marked is None:
        return _File(item, relative.parent.as_posix(), relative.name, None)
    return _File(item, relative.parent.as_posix(), marked["rest"], marked["mark"].lower() == "correct")


def _same_names(files: Sequence[_File]) -> dict[str, str]:
    """Files that differ in their suffix only."""
    counts = Counter(file.item.name for file in files)
    reason = "there are several files of this name with different suffixes"
    return {name: reason for name, count in counts.items() if count > 1}


def _pair_marked(root: Path, files: Sequence[_File], failures: dict[str, str]) -> Iterator[Pair]:
    for file in files:
        if file.correct is None:
            failures[file.item.name] = "its name ends neither with correct nor with incorrect"
    marked = [file for file in files if file.correct is not None]
    ways = {way: _complete(marked, key) for way, key in _WAYS.items()}
    way = _choose_way(root, ways, num_files=len(marked))
    logger.info("%d pairs of correct and incorrect files by %s.", len(ways[way]), way)
    paired = set()
    for (folder, key), (correct, incorrect) in ways[way].items():
        paired |= {correct.item.name, incorrect.item.name}
        yield Pair(_join(folder, key), "", "", correct.item, incorrect.item)
    for file in marked:
        if file.item.name not in paired:
            failures[file.item.name] = "has no counterpart, or several"


def _choose_way(root: Path, ways: Mapping[str, _Groups], *, num_files: int) -> str:
    """The way that pairs every file, the same name before the same number; else the only one that pairs any.

    What is left of an incomplete folder may pair by the rest of the names though it belongs together by the
    numbers, or the reverse, so the number of pairs says nothing.

    Raises:
        DataError: ways disagree.
    """
    if 2 * len(ways[_BY_NAME]) == num_files:
        return _BY_NAME
    if not ways[_BY_NAME] and 2 * len(ways[_BY_NUMBER]) == num_files:
        return _BY_NUMBER
    found = [way for way, groups in ways.items() if groups]
    if not found:
        return _BY_NAME
    first = _names(ways[found[0]])
    for other in found[1:]:
        pairs = _names(ways[other])
        if pairs != first:
            examples = (min(first - pairs, default=min(first)), min(pairs - first, default=min(pairs)))
            said = (
                f"{correct} with {incorrect} by {way}"
                for way, (correct, incorrect) in zip((found[0], other), examples, strict=True)
            )
            raise DataError(
                f"{root}: names pair in more than one way, {' and '.join(said)}; files are missing, or some "
                "are called otherwise than the others: complete the folder, or rename or remove them."
            )
    return found[0]


def _names(groups: _Groups) -> set[tuple[str, str]]:
    return {(correct.item.name, incorrect.item.name) for correct, incorrect in groups.values()}


def _complete(files: Sequence[_File], key: Callable[[_File], str | None]) -> _Groups:
    """Groups of exactly one correct and one incorrect file, by folder and key."""
    groups: dict[tuple[str, str], list[_File]] = {}
    for file in files:
        value = key(file)
        if value is not None:
            groups.setdefault((file.folder, value), []).append(file)
    complete = {}
    for place, group in groups.items():
        if len(group) == 2 and group[0].correct != group[1].correct:
            complete[place] = (group[0], group[1]) if group[0].correct else (group[1], group[0])
    return complete


def _pair_numbered(root: Path, files: Sequence[_File], failures: dict[str, str]) -> Iterator[Pair]:
    folders: dict[str, dict[int, _File]] = {}
    for file in files:
        number = _part(file.stem, "number")
        if number is None:
            failures[file.item.name] = "its name says neither correct nor incorrect and starts with no number"
        elif int(number) in folders.setdefault(file.folder, {}):
            other = folders[file.folder][int(number)].item.name
            failures[file.item.name] = f"has the same number as {other}"
        else:
            folders[file.folder][int(number)] = file
    for folder, numbered in folders.items():
        place, first, last = root / folder, min(numbered), max(numbered)
        if first > 1 or (last - first) % 2 == 0:
            raise DataError(
                f"{place}: files {first} to {last} are paired by their numbers, which must be an even count "
                "from 0 or 1; a file is missing at one end, and so it is not known which ones are correct."
            )
        logger.info("%s: pairs of consecutive numbers from %d on, the correct one first.", place, first)
        for start in sorted({each - (each - first) % 2 for each in numbered}):
            correct, incorrect = numbered.get(start), numbered.get(start + 1)
            if correct is not None and incorrect is not None:
                yield Pair(_join(folder, str(start)), "", "", correct.item, incorrect.item)
                continue
            for alone in (correct, incorrect):
                if alone is not None:
                    failures[alone.item.name] = f"has no counterpart, number {start} or {start + 1}"


def _part(stem: str, name: str) -> str | None:
    match = _NUMBER.match(stem)
    return None if match is None else match[name]


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part not in (".", ""))
