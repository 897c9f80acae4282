"""Word timings of a recording, as moshi-finetune's `annotate.py` writes them, and its text conditions."""

import json
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import DataError
from finetune.files import hash_json
from moshi_ttt.files.regular_file import read_text

SPEAKERS = ("SPEAKER_MAIN", "SPEAKER_USER")  # Moshi on the left channel, the user on the right
_EXPECTED = '["word", [start_sec, end_sec], "SPEAKER_MAIN"]'


class Word(NamedTuple):
    """One spoken word, and when it is heard, in seconds from the start of the recording.

    Attributes:
        text: the word as written.
        start_sec: start.
        end_sec: end; may be at the start, where only starts are known, or before it in faulty transcripts.
        speaker: `SPEAKER_MAIN` for the left channel; empty while only one voice is looked at.
    """

    text: str
    start_sec: float
    end_sec: float
    speaker: str = ""


@dataclass(frozen=True)
class Transcript:
    """What the file beside a recording says.

    Attributes:
        words: sorted by their start; words with the same start keep their order. May be empty.
        text_conditions: texts by the name of the condition; empty where the file has none.
    """

    words: list[Word]
    text_conditions: dict[str, str]


@dataclass(frozen=True)
class TimingFile:
    """A file with word timings that was looked at.

    Attributes:
        text_conditions: as in `Transcript`.
        digest: of its words and conditions, whatever its spelling of them; empty: there is no file.
        num_words: by speaker.
    """

    text_conditions: dict[str, str] = field(default_factory=dict)
    digest: str = ""
    num_words: Counter[str] = field(default_factory=Counter)


def load_alignments(path: Path) -> list[Word]:
    """The words of `load_transcript`, which it raises as."""
    return load_transcript(path).words


def delayed(words: Iterable[Word], seconds: float) -> list[Word]:
    """Words that come later; those before the start of the recording stay there."""
    return [
        word._replace(start_sec=word.start_sec + seconds, end_sec=word.end_sec + seconds)
        if word.start_sec >= 0
        else word
        for word in words
    ]


def load_transcript(path: Path) -> Transcript:
    """Read `{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}`.

    Args:
        path: the `.json` file, maybe with `"text_conditions": {"name": "text"}`; further top-level keys
            are ignored.

    Raises:
        DataError: the file cannot be read or an entry has another form; names the file and the entry.
    """
    content = _read_json(path)
    entries = content.get("alignments") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f'{path}: expected {{"alignments": [{_EXPECTED}, ...]}}, a list under "alignments".')
    words = [_parse_word(entry, where=f"{path}: alignments[{i}]") for i, entry in enumerate(entries)]
    conditions = _parse_conditions(content.get("text_conditions"), where=f"{path}: text_conditions")
    return Transcript(sorted(words, key=lambda word: word.start_sec), conditions)


def alignment_entries(words: Iterable[Word]) -> list[list[Any]]:
    """Words as the entries of `"alignments"`, sorted by their start, in milliseconds."""
    rounded = [
        word._replace(start_sec=round(word.start_sec, 3), end_sec=round(word.end_sec, 3)) for word in words
    ]
    rounded.sort(key=lambda word: word.start_sec)
    return [[word.text, [word.start_sec, word.end_sec], word.speaker] for word in rounded]


def look_at_timings(path: Path) -> TimingFile:
    """Read the text conditions, and the words only to count them and to know them again.

    Raises as `load_transcript` does.
    """
    content = _read_json(path)
    content = content if isinstance(content, dict) else {}
    conditions = _parse_conditions(content.get("text_conditions"), where=f"{path}: text_conditions")
    words = content.get("alignments")
    entries = [entry for entry in words if isinstance(entry, list)] if isinstance(words, list) else []
    num_words = Counter(str(entry[-1]) for entry in entries if entry)
    return TimingFile(conditions, hash_json([words, conditions]), num_words)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"{path}: cannot read the word timings ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the word timings are not valid JSON ({error}).") from error


def _parse_conditions(value: Any, *, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected {{"name": "text", ...}}, not {reprlib.repr(value)}.')
    for name, text in value.items():
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {name!r} must be a string, not {reprlib.repr(text)}; leave out what is not known."
            )
        _check_characters(name, where=f"{where}: the name")
        _check_characters(text, where=f"{where}: the text")
    return value


def _parse_word(entry: Any, *, where: str) -> Word:
    if not isinstance(entry, list) or len(entry) != 3:
        raise DataError(f"{where}: expected {_EXPECTED}, not {reprlib.repr(entry)}.")
    text, span, speaker = entry
    if not isinstance(text, str):
        raise DataError(
            f"{where}: the word must be a string, not {reprlib.repr(text)}; expected {_EXPECTED}."
        )
    _check_characters(text, where=f"{where}: the word")
    if not isinstance(span, list) or len(span) != 2:
        raise DataError(f"{where}: the times must be [start_sec, end_sec], not {reprlib.repr(span)}.")
    if not isinstance(speaker, str):
        raise DataError(
            f"{where}: the speaker must be a string, not {reprlib.repr(speaker)}; expected {_EXPECTED}."
        )
    start_sec, end_sec = (_time(value, where=where) for value in span)
    return Word(text=text, start_sec=start_sec, end_sec=end_sec, speaker=speaker)


def _check_characters(text: str, *, where: str) -> None:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise DataError(f"{where} {reprlib.repr(text)} holds characters that no text has.")


def _time(value: Any, *, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: a time must be a number of seconds, not {reprlib.repr(value)}.")
    if not 0 <= value <= sys.float_info.max:
        raise DataError(f"{where}: a time must be finite and not negative, not {reprlib.repr(value)}.")
    return float(value)
