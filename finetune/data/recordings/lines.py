"""Manifests: which recordings a data set holds, one JSON object per line."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.recordings.recording import Fault, Line, Recording, noted_before
from finetune.data.recordings.sources import DataSource, parse_sources
from finetune.errors import DataError
from moshi_ttt.files.regular_file import read_text


@dataclass(frozen=True)
class ManifestEntry:
    """A line of a manifest.

    Attributes:
        path: the audio file.
        duration_sec: its stated length in seconds, None when the line has none.
        fields: all that the line says.
        line: where it is; as a string, for messages.
        folder: the manifest's folder, where relative paths start.
        source: which of several sources it comes from.
    """

    path: Path
    duration_sec: float | None
    fields: dict[str, Any]
    line: Line
    folder: Path
    source: int = 0

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return str(self.line)


def load_manifest(source: str | Path | Sequence[DataSource], *, key: str) -> list[Recording]:
    """Read the recordings of a data set and look at the files that it names.

    Each line of a manifest is `{"path": "relative/or/absolute.wav", "duration": seconds}`; relative paths
    start at the manifest's folder. Further keys are ignored, blank lines too.

    Args:
        source: a `.jsonl` file, or a folder: every `*.jsonl` below it, in the order of their paths; or
            several of them, see `finetune.data.recordings.sources`.
        key: name of the configuration key that held `source`, for messages (`data.train_data`).

    Returns:
        The recordings in the manifests' order, at least one.

    Raises:
        DataError: `source` cannot be used, a line is malformed, a recording is listed twice, or
            `check_recording` refuses it.
    """
    faults: list[Fault] = []
    recordings = check_manifest(source, key=key, on_fault=faults.append)
    raise_first(faults, source=source)
    return recordings


def raise_first(faults: Sequence[Fault], *, source: object) -> None:
    """Raise the first fault and says how many more there are.

    Args:
        faults: of the recordings of one source, or none.
        source: what was to be read, for messages.

    Raises:
        DataError: there is a fault.
    """
    if not faults:
        return
    more = ""
    if len(faults) > 1:
        more = f" … and {len(faults) - 1} more; `python -m finetune.data.check {source}` lists them."
    raise DataError(faults[0].message + more)


def check_manifest(
    source: str | Path | Sequence[DataSource],
    *,
    key: str,
    on_fault: Callable[[Fault], None],
    check: Callable[[Recording], None] | None = None,
    need_words: bool = True,
) -> list[Recording]:
    """Read the recordings as `load_manifest` does, but goes on after faults.

    Args:
        source: see `load_manifest`.
        key: see `load_manifest`.
        on_fault: called with each line that cannot be used.
        check: a further look at a recording whose files exist; it raises DataError.
        need_words: each recording has word timings of its own.

    Returns:
        The others.

    Raises:
        DataError: `source` itself cannot be used.
    """
    usable = []
    timings: dict[str, Path] = {}
    for entry in read_manifest(source, key=key, on_fault=on_fault):
        recording = to_recording(entry)
        try:
            check_recording(recording, need_words=need_words)
            other = noted_before(timings, recording.alignment_path, recording.path)
            if other is not None and need_words:
                raise DataError(
                    f"{recording.path} and {other} share the word timings {recording.alignment_path}; "
                    "give each recording a name of its own."
                )
            if check is not None:
                check(recording)
        except DataError as error:
            on_fault(recording.fault(str(error)))
        else:
            usable.append(recording)
    return usable


def to_recording(entry: ManifestEntry) -> Recording:
    """The recording of a manifest's line that has a duration."""
    assert entry.duration_sec is not None
    return Recording(
        entry.path, entry.duration_sec, entry.path.with_suffix(".json"), entry.line, entry.source
    )


def check_recording(recording: Recording, *, need_words: bool = True) -> None:
    """Look whether a recording's files are there, its word timings where they are needed.

    Raises:
        DataError: one is missing.
    """
    if not _is_file(recording.path):
        start = "" if recording.line is None else f"; paths are relative to {recording.line.manifest.parent}"
        raise DataError(f"audio file {recording.path} does not exist{start}.")
    if need_words and not _is_file(recording.alignment_path):
        raise DataError(
            f"word timings {recording.alignment_path} do not exist; put them beside the audio as "
            '{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}, or set data.text: none.'
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def read_manifest(
    source: str | Path | Sequence[DataSource],
    *,
    key: str,
    need_duration: bool = True,
    on_fault: Callable[[Fault], None] | None = None,
) -> Iterator[ManifestEntry]:
    """Yield the lines of manifests, without a look at the files that they name.

    Args:
        source: see `load_manifest`.
        key: see `load_manifest`.
        need_duration: "duration" may not be missing.
        on_fault: called with each line that cannot be used; None raises the first.

    Raises:
        DataError: `source` cannot be used; or without `on_fault`, a line is malformed, or a recording is
            listed twice.
    """
    if isinstance(source, str | Path):
        source = parse_sources(str(source), key=key)
    first_seen: dict[str, Line] = {}
    for number, part in enumerate(source):
        num_lines = 0
        for manifest in _manifest_files(part.path, key=key):
            for line, text in _numbered_lines(manifest, key=key):
                num_lines += 1
                try:
                    entry = _parse_line(text, line=line, need_duration=need_duration, source=number)
                    _note(entry, first_seen)
                except _LineError as error:
                    fault = Fault(str(manifest), line.number, error.path, str(error), key)
                    if on_fault is None:
                        raise DataError(fault.message) from error
                    on_fault(fault)
                else:
                    yield entry
        if not num_lines:
            raise DataError(
                f"{key}: {part.path} lists no recordings; add lines like "
                '{"path": "a.wav", "duration": 12.5}.'
            )


class _LineError(ValueError):
    """What is wrong with a line, and the audio file that it names."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(reason)
        self.path = path


def _note(entry: ManifestEntry, first_seen: dict[str, Line]) -> None:
    first = noted_before(first_seen, entry.path, entry.line)
    if first is not None:
        raise _LineError(f"{entry.path} is already listed ({first}); remove one line.", str(entry.path))


def _manifest_files(source: Path, *, key: str) -> list[Path]:
    try:
        path = source.expanduser()
    except RuntimeError:  # no such user
        raise DataError(f"{key}: {source} does not exist; its home folder is not known.") from None
    if path.is_dir():
        manifests = sorted(path.rglob("*.jsonl"))
        if not manifests:
            raise DataError(f"{key}: no .jsonl file below the folder {path}; name a manifest or add one.")
        return manifests
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(
                f"{key}: {path} is not a .jsonl file; name a manifest or a folder with manifests."
            )
        return [path]
    raise DataError(f"{key}: {path} does not exist; name a .jsonl file or a folder with .jsonl files.")


def _numbered_lines(manifest: Path, *, key: str) -> Iterator[tuple[Line, str]]:
    """Yield where it is and the text of each line that is not blank."""
    try:
        text = read_text(manifest)
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: cannot read {manifest} as UTF-8 text ({error}).") from error
    except OSError as error:
        raise DataError(f"{key}: cannot read {manifest} ({error.strerror}).") from error
    # Not splitlines(): a JSON string may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Line(manifest, number, key), line


def _parse_line(text: str, *, line: Line, need_duration: bool, source: int) -> ManifestEntry:
    example = 'expected {"path": "a.wav", "duration": 12.5}'
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise _LineError(f"not valid JSON ({error.msg}, column {error.colno}); {example}.") from error
    except (ValueError, RecursionError) as error:
        raise _LineError(f"not valid JSON ({error}); {example}.") from error
    if not isinstance(fields, dict):
        raise _LineError(f"a JSON object is needed, not {type(fields).__name__}; {example}.")
    for name in ("path", "duration") if need_duration else ("path",):
        if name not in fields:
            raise _LineError(f'the field "{name}" is missing; {example}.', str(fields.get("path", "")))
    if not isinstance(fields["path"], str) or not fields["path"]:
        raise _LineError(f'"path" must be a non-empty string, not {fields["path"]!r}; {example}.')
    folder = line.manifest.parent
    path = folder / fields["path"]
    if not path.name:
        raise _LineError(f'"path" must name a file, not {fields["path"]!r}; {example}.', str(path))
    duration_sec = _duration(fields["duration"], path=path) if "duration" in fields else None
    return ManifestEntry(path, duration_sec, fields, line, folder, source)


def _duration(value: Any, *, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _LineError(f'"duration" must be a number of seconds, not {value!r}.', str(path))
    if not 0 < value <= sys.float_info.max:
        raise _LineError(f'"duration" must be finite and above 0 seconds, not {value!r}.', str(path))
    return float(value)


@dataclass(frozen=True)
class ManifestLine:
    """A line of a manifest as it stands there.

    Attributes:
        manifest: the file.
        number: of the line, from 1.
        text: without its line feed.
        entry: what it says; without a duration where only that is faulty, None where nothing can be used.
        fault: what is wrong with it, None where nothing is.
    """

    manifest: Path
    number: int
    text: str
    entry: ManifestEntry | None
    fault: str | None


def read_lines(source: str | Path, *, key: str) -> Iterator[ManifestLine]:
    """Yield all lines of manifests that are not blank, those with faults too.

    Args:
        source: see `load_manifest`.
        key: see `load_manifest`.

    Raises:
        DataError: `source` cannot be read at all.
    """
    for number, part in enumerate(parse_sources(str(source), key=key)):
        for manifest in _manifest_files(part.path, key=key):
            for line, text in _numbered_lines(manifest, key=key):
                try:
                    entry = _parse_line(text, line=line, need_duration=True, source=number)
                    yield ManifestLine(manifest, line.number, text, entry, None)
                except _LineError as error:
                    rest = _without_duration(text, line=line, source=number)
                    yield ManifestLine(manifest, line.number, text, rest, str(error))


def _without_duration(text: str, *, line: Line, source: int) -> ManifestEntry | None:
    """What a faulty line says if its fault is the duration."""
    try:
        fields = json.loads(text)
        fields.pop("duration", None)
        return _parse_line(json.dumps(fields), line=line, need_duration=False, source=source)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
