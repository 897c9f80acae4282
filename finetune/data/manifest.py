"""Manifests: which recordings a data set holds, one JSON object per line."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError


@dataclass(frozen=True)
class Recording:
    """One stereo recording: left channel Moshi, right channel the user.

    Attributes:
        path: The audio file.
        duration_sec: Its length in seconds as the manifest states it.
        alignment_path: Word timings, the file beside the audio with the suffix ``.json``.
    """

    path: Path
    duration_sec: float
    alignment_path: Path


@dataclass(frozen=True)
class ManifestEntry:
    """A line of a manifest.

    Attributes:
        path: The audio file.
        duration_sec: Its stated length in seconds, None when the line has none.
        fields: All that the line says.
        where: File and line, for messages.
        folder: The manifest's folder, where relative paths start.
    """

    path: Path
    duration_sec: float | None
    fields: dict[str, Any]
    where: str
    folder: Path


def load_manifest(source: str | Path, *, key: str) -> list[Recording]:
    """Reads the recordings of a data set.

    Each line of a manifest is ``{"path": "relative/or/absolute.wav", "duration": seconds}``; relative paths
    start at the manifest's folder. Further keys are ignored, blank lines too.

    Args:
        source: A ``.jsonl`` file, or a folder: every ``*.jsonl`` below it, in the order of their paths.
        key: Name of the configuration key that held ``source``, for messages (``data.train_data``).

    Returns:
        The recordings in the manifests' order, at least one.

    Raises:
        DataError: ``source`` cannot be used, a line is malformed, a recording is listed twice, or its audio
            or word timings are missing.
    """
    return [_with_files(entry) for entry in read_manifest(source, key=key)]


def read_manifest(source: str | Path, *, key: str, need_duration: bool = True) -> Iterator[ManifestEntry]:
    """Yields the lines of manifests, without a look at the files that they name.

    Args:
        source: see `load_manifest`.
        key: see `load_manifest`.
        need_duration: "duration" may not be missing.

    Raises:
        DataError: ``source`` cannot be used, a line is malformed, or a recording is listed twice.
    """
    first_seen: dict[str, str] = {}
    for manifest in _manifest_files(source, key=key):
        for where, line in _numbered_lines(manifest, key=key):
            entry = _parse_line(line, folder=manifest.parent, where=where, need_duration=need_duration)
            # Not resolve(): in a downloaded snapshot, different recordings may be links to one blob.
            identity = os.path.abspath(entry.path)
            if identity in first_seen:
                raise DataError(
                    f"{where}: {entry.path} is already listed ({first_seen[identity]}); remove one line."
                )
            first_seen[identity] = where
            yield entry
    if not first_seen:
        raise DataError(
            f'{key}: {source} lists no recordings; add lines like {{"path": "a.wav", "duration": 12.5}}.'
        )


def _manifest_files(source: str | Path, *, key: str) -> list[Path]:
    path = Path(source).expanduser()
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
    if "," in str(source) or ":" in str(source):
        raise DataError(
            f"{key}: {source}: several sources ('a,b') and weights ('a:0.5') are not supported yet; "
            "name one .jsonl file or one folder."
        )
    raise DataError(f"{key}: {path} does not exist; name a .jsonl file or a folder with .jsonl files.")


def _numbered_lines(manifest: Path, *, key: str) -> Iterator[tuple[str, str]]:
    """Yields (where it is, for messages; text) of each line that is not blank."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: cannot read {manifest} as UTF-8 text ({error}).") from error
    # Not splitlines(): a JSON string may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{key}: {manifest} line {number}", line


def _parse_line(line: str, *, folder: Path, where: str, need_duration: bool) -> ManifestEntry:
    example = 'expected {"path": "a.wav", "duration": 12.5}'
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); {example}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); {example}.") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a JSON object is needed, not {type(entry).__name__}; {example}.")
    for field in ("path", "duration") if need_duration else ("path",):
        if field not in entry:
            raise DataError(f'{where}: the field "{field}" is missing; {example}.')
    if not isinstance(entry["path"], str) or not entry["path"]:
        raise DataError(f'{where}: "path" must be a non-empty string, not {entry["path"]!r}; {example}.')
    duration_sec = _duration(entry["duration"], where=where) if "duration" in entry else None
    return ManifestEntry(folder / entry["path"], duration_sec, entry, where, folder)


def _with_files(entry: ManifestEntry) -> Recording:
    path, where = entry.path, entry.where
    if not path.is_file():
        raise DataError(f"{where}: audio file {path} does not exist; paths are relative to {entry.folder}.")
    alignment_path = path.with_suffix(".json")
    if not alignment_path.is_file():
        raise DataError(
            f"{where}: word timings {alignment_path} do not exist; put them beside the audio as "
            '{"alignments": [["word", [start_sec, end_sec], "SPEAKER_MAIN"], ...]}.'
        )
    return Recording(path=path, duration_sec=entry.duration_sec, alignment_path=alignment_path)


def _duration(value: Any, *, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f'{where}: "duration" must be a number of seconds, not {value!r}.')
    if not 0 < value <= sys.float_info.max:
        raise DataError(f'{where}: "duration" must be finite and above 0 seconds, not {value!r}.')
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
    """Yields all lines of manifests that are not blank, those with faults too.

    Args:
        source: see `load_manifest`.
        key: see `load_manifest`.

    Raises:
        DataError: ``source`` cannot be read at all.
    """
    for manifest in _manifest_files(source, key=key):
        for where, text in _numbered_lines(manifest, key=key):
            number = int(where.rpartition(" ")[2])
            try:
                entry = _parse_line(text, folder=manifest.parent, where=where, need_duration=True)
                yield ManifestLine(manifest, number, text, entry, None)
            except DataError as error:
                entry = _without_duration(text, folder=manifest.parent, where=where)
                yield ManifestLine(manifest, number, text, entry, str(error).removeprefix(f"{where}: "))


def _without_duration(text: str, *, folder: Path, where: str) -> ManifestEntry | None:
    """What a faulty line says if its fault is the duration."""
    try:
        fields = json.loads(text)
        fields.pop("duration", None)
        return _parse_line(json.dumps(fields), folder=folder, where=where, need_duration=False)
    except (DataError, ValueError, AttributeError, TypeError, RecursionError):
        return None


if __name__ == "__main__":
    from finetune.cli import run_command
    from finetune.data.manifest_command import write_manifest

    run_command(write_manifest)
