"""Folders of items: what is said once, what comes in between, and where it is needed again.

An item is a group of K conversations that differ in one thing: what was said in the beginning. All of them
go on with the same filler, the same cue and the same K answers, of which another one is right in each. So a
model that cannot reach the beginning prefers the same answer in all K, and is right in exactly one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.data.audio.find import find_audio_files, printable
from finetune.errors import DataError
from moshi_ttt.files.regular_file import read_text

ITEMS_FILE = "recall.jsonl"
FILLER_DIR = "filler"
SPEAKERS = ("user", "moshi")

_Text = Annotated[str, Field(min_length=1, max_length=1000)]
_Paths = Annotated[list[_Text], Field(min_length=2, max_length=64)]


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    id: _Text
    kind: _Text
    said_by: Literal["user", "moshi"]
    plants: _Paths
    cue: _Text
    answers: _Paths
    filler: Annotated[list[_Text], Field(min_length=1)] | None = None


@dataclass(frozen=True)
class Group:
    """K conversations that differ in their plant; every path is a recording with its words beside it.

    Attributes:
        name: tells it from the others of the folder.
        kind: of what is to be remembered: name, number, place, …
        said_by: who says the plant, `user` or `moshi`.
        plants: what is said once, one per conversation.
        cue: what comes right before the answer, in all of them.
        answers: the candidates; number i is right in conversation i.
        filler: what may come in between.
    """

    name: str
    kind: str
    said_by: str
    plants: tuple[Path, ...]
    cue: Path
    answers: tuple[Path, ...]
    filler: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """All recordings."""
        return [*self.plants, self.cue, *self.answers, *self.filler]


@dataclass(frozen=True)
class Items:
    """A folder of items.

    Attributes:
        groups: those that can be used, in the order of the file.
        failures: why others cannot, by name, or by line where they have none.
    """

    groups: Sequence[Group]
    failures: dict[str, str]


def read_items(folder: Path) -> Items:
    """Read `recall.jsonl` of a folder and see that the recordings exist; docs/recall.md has the layout.

    Raises:
        DataError: there is no such file, or it lists nothing.
    """
    path = folder / ITEMS_FILE
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"--data: cannot read {path} as UTF-8 text ({error}).") from None
    except OSError as error:
        raise DataError(
            f"--data: cannot read {path} ({error.strerror}); docs/recall.md says what is in it."
        ) from None
    groups: dict[str, Group] = {}
    failures: dict[str, str] = {}
    shared = tuple(find_audio_files(folder / FILLER_DIR)) if (folder / FILLER_DIR).is_dir() else ()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"line {number}"
        try:
            fields = _parse(line)
            name = printable(fields.id)
            if name in groups or name in failures:
                name = f"line {number}"
                raise DataError(f"the id {fields.id!r} is that of an earlier line; give each its own")
            groups[name] = _group(name, fields, folder, shared)
        except DataError as error:
            failures[name] = printable(f"{path}, line {number}: {error}.")
    if not groups and not failures:
        raise DataError(f"--data: {path} lists no items.")
    return Items(list(groups.values()), failures)


def _parse(line: str) -> _Line:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is needed, not {type(value).__name__}")
    try:
        return _Line.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def _group(name: str, fields: _Line, folder: Path, shared: Sequence[Path]) -> Group:
    if len(fields.plants) != len(fields.answers):
        raise DataError(f"{len(fields.plants)} plants need as many answers, not {len(fields.answers)}")
    filler = tuple(shared) if fields.filler is None else tuple(folder / path for path in fields.filler)
    if not filler:
        raise DataError(f"no filler; name some, or put recordings into {folder / FILLER_DIR}")
    group = Group(
        name,
        fields.kind,
        fields.said_by,
        tuple(folder / path for path in fields.plants),
        folder / fields.cue,
        tuple(folder / path for path in fields.answers),
        filler,
    )
    for path in group.files:
        if not path.is_file():
            raise DataError(f"{path} does not exist; paths are relative to {folder}")
    return group
