"""The folder with the converted recordings and their manifest; the same command goes on in it."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.audio.read import read_audio_header
from finetune.data.convert.recording import convert_recording
from finetune.data.convert.source import Source, SourceFault, SourceRecording
from finetune.errors import DataError
from finetune.files import read_json_object
from moshi_ttt.files.atomic_file import replacing

MANIFEST = "manifest.jsonl"
MARKER = "convert.json"  # what the folder is made from
AUDIO = "audio"


@dataclass
class Report:
    """What became of the recordings.

    Attributes:
        converted: how many were written.
        kept: how many were there from before.
        faults: those that are left out.
        hours: of audio in the data set.
        num_mono: recordings of one voice.
        num_outside: words that lie outside their recordings.
        num_estimated: recordings with estimated word times.
    """

    converted: int = 0
    kept: int = 0
    faults: list[SourceFault] = field(default_factory=list)
    hours: float = 0.0
    num_mono: int = 0
    num_outside: int = 0
    num_estimated: int = 0


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that it was made from the same source in the same way.

    Args:
        out: the folder.
        settings: JSON; the source and all that decides what is made of it.

    Raises:
        DataError: there is something else.
    """
    marker = out / MARKER
    if marker.is_file():
        made = read_json_object(marker, error=DataError)
        different = sorted(key for key in made.keys() | settings.keys() if made.get(key) != settings.get(key))
        if different:
            key = different[0]
            raise DataError(
                f"{out}: was made with {key} {made.get(key)!r}, not {settings.get(key)!r}; choose another "
                "--out."
            )
        return
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out}: exists and was not made by this command; choose another --out.")
    (out / AUDIO).mkdir(parents=True)
    with replacing(marker) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def convert_all(source: Source, out: Path) -> Report:
    """Convert all recordings and write the manifest, which lists those that can be used.

    Args:
        source: the recordings in the order of the manifest.
        out: see `open_folder`.

    Raises:
        DataError: the source cannot be read, or none of it can be used.
        OSError: a file cannot be written.
    """
    report, lines = Report(), []
    names: dict[str, str] = {}
    for entry in source:
        if isinstance(entry, SourceFault):
            report.faults.append(entry)
            continue
        try:
            lines.append(_convert(entry, out, names, report))
        except DataError as error:
            report.faults.append(SourceFault(entry.where, str(error)))
    if not lines:
        reason = f"; the first: {report.faults[0].where}: {report.faults[0].reason}" if report.faults else ""
        raise DataError(f"{out}: no recording of the source can be used{reason}")
    with replacing(out / MANIFEST) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return report


def _convert(entry: SourceRecording, out: Path, names: dict[str, str], report: Report) -> dict[str, Any]:
    """Convert a recording; returns its line of the manifest."""
    name = re.sub(r"[^\w.-]+", "_", entry.name).lstrip(".")
    if not name:
        raise DataError(f"{entry.name!r} is no name for a file.")
    if name in names:
        raise DataError(f"would be called {name}, as the one of {names[name]}; rename one of them.")
    names[name] = entry.where
    path = out / AUDIO / f"{name}.wav"
    was_there = convert_recording(entry, path)
    header = read_audio_header(path)
    duration_sec = header.num_samples / header.sample_rate
    report.kept += was_there
    report.converted += not was_there
    report.hours += duration_sec / 3600
    report.num_mono += len(entry.tracks) == 1
    report.num_outside += entry.num_outside
    report.num_estimated += bool(entry.untimed)
    line: dict[str, Any] = {"path": f"{AUDIO}/{path.name}", "duration": round(duration_sec, 6)}
    if entry.speaker:
        line["speaker"] = entry.speaker
    if entry.transcript:
        line["text"] = {"left": entry.transcript}
    return line
