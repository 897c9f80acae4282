"""What a data set of others says of one recording, whatever its layout."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.words import Word
from finetune.errors import DataError


class Track(NamedTuple):
    """A voice: a channel, counted from 0, of an audio file; None: the only one of a mono file."""

    path: Path
    channel: int | None


class Untimed(NamedTuple):
    """What is said in a stretch of the recording, without the times of its words.

    Attributes:
        text: words separated by white space.
        start_sec: of the stretch, in seconds from the start of the recording.
        end_sec: its end; None: that of the recording.
        track: which of the tracks says it.
    """

    text: str
    start_sec: float = 0.0
    end_sec: float | None = None
    track: int = 0


@dataclass(frozen=True)
class SourceRecording:
    """A recording to convert.

    Attributes:
        where: file and line or entry, for messages.
        name: of its files in the data set.
        tracks: Moshi and the user; or Moshi alone, which becomes a mono recording.
        words: with their times from `start_sec` on and their speakers.
        untimed: texts whose words' times are estimated.
        transcript: of Moshi, for an aligner that looks for its words later; empty: none.
        start_sec: where it starts in the audio files.
        duration_sec: its length; None: up to their end.
        speaker: who it is, for the manifest; empty: not known.
        num_outside: words that are left out because they are said before or after it.
    """

    where: str
    name: str
    tracks: tuple[Track, ...]
    words: tuple[Word, ...] = ()
    untimed: tuple[Untimed, ...] = ()
    transcript: str = ""
    start_sec: float = 0.0
    duration_sec: float | None = None
    speaker: str = ""
    num_outside: int = 0


class SourceFault(NamedTuple):
    """Why a recording cannot be converted: file and line or entry, and the reason."""

    where: str
    reason: str


Source = Iterator[SourceRecording | SourceFault]


def number(fields: dict[str, Any], key: str) -> float:
    """A number of seconds.

    Raises:
        DataError: it is missing or no finite number from 0 on.
    """
    return seconds(fields.get(key), f'"{key}"')


def seconds(value: Any, what: str) -> float:
    """The same of a value that is at hand."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(f"{what} must be a number of seconds from 0 on, not {value!r}.")
    return float(value)


def text(fields: dict[str, Any], key: str) -> str:
    """A text that is not empty.

    Raises:
        DataError: it is missing or something else.
    """
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f'"{key}" must be a text that is not empty, not {value!r}.')
    return value


def entries(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects; None is an empty one.

    Raises:
        DataError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise DataError(f"{what} must be a list of objects.")
    return value


def json_lines(lines: Iterator[str], path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Yield the number of each line that is not blank, from 1, and its object, or what is wrong with it.

    Raises:
        DataError: the rest of the file cannot be read.
    """
    line_number = 0
    try:
        for line_number, line in enumerate(lines, 1):
            if line.strip():
                yield line_number, _json_object(line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read behind line {line_number} ({error}).") from None


def _json_object(line: str) -> dict[str, Any] | DataError:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"is not valid JSON ({error}).")
    return fields if isinstance(fields, dict) else DataError("is no JSON object.")
