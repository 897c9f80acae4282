"""Hugging Face's audio folders: audio files of one voice, and `metadata.csv` or `metadata.jsonl`.

A line names a file (`file_name`) and what is said in it (https://huggingface.co/docs/datasets/audio_dataset).
"""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from finetune.data.convert.source import (
    Source,
    SourceFault,
    SourceRecording,
    Track,
    Untimed,
    json_lines,
    text,
)
from finetune.errors import DataError
from moshi_ttt.files.regular_file import regular_only

_FILES = ("metadata.csv", "metadata.jsonl")


def read_audiofolder(source: Path, *, text_column: str, times: Literal["estimate", "annotate"]) -> Source:
    """Yield the recordings in the order of the metadata; a text has no times, so these are estimated.

    Args:
        source: the folder that holds the metadata.
        text_column: what is said.
        times: `annotate` leaves the times to `annotate.py`.

    Raises:
        DataError: there is no metadata, or it cannot be read at all.
    """
    metadata = _metadata(source)
    read = _read_csv if metadata.suffix == ".csv" else _read_jsonl
    for line, fields in read(metadata):
        where = f"{metadata} line {line}"
        try:
            if isinstance(fields, DataError):
                raise fields
            yield _recording(fields, where=where, folder=source, text_column=text_column, times=times)
        except DataError as error:
            yield SourceFault(where, str(error))


def _metadata(source: Path) -> Path:
    if not source.is_dir():
        raise DataError(f"{source}: is no folder; name the one that holds {' or '.join(_FILES)}.")
    found = [source / name for name in _FILES if (source / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{source}: holds {' and '.join(_FILES)}; remove one of them.")
    below = sorted(str(path.parent) for name in _FILES for path in source.glob(f"*/{name}"))
    hint = f"; name one of {', '.join(below)}" if below else ""
    if (source / "metadata.parquet").is_file():
        hint = "; of metadata.parquet, write a .csv"
    raise DataError(f"{source}: holds no {' or '.join(_FILES)}{hint}.")


def _recording(
    fields: dict[str, Any], *, where: str, folder: Path, text_column: str, times: str
) -> SourceRecording:
    name = PurePosixPath(text(fields, "file_name"))
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f'"file_name" must lie in the folder of the metadata, not at {name}.')
    if text_column not in fields:
        columns = ", ".join(key for key in fields if key != "file_name")
        raise DataError(f'there is no column "{text_column}" (--text-column), but {columns or "no other"}.')
    said = text(fields, text_column)
    speaker = fields.get("speaker", fields.get("speaker_id"))
    return SourceRecording(
        where,
        str(name.with_suffix("")),
        (Track(folder / name, None),),
        untimed=(Untimed(said),) if times == "estimate" else (),
        transcript=said if times == "annotate" else "",
        speaker=str(speaker) if isinstance(speaker, str | int) else "",
    )


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    with open(path, encoding="utf-8-sig", newline="", opener=regular_only) as file:
        reader = csv.DictReader(file)
        try:
            for fields in reader:
                if None in fields or None in fields.values():
                    yield reader.line_num, DataError("has another number of columns than the first line.")
                else:
                    yield reader.line_num, fields
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read behind line {reader.line_num} ({error}).") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    with open(path, encoding="utf-8-sig", opener=regular_only) as file:
        yield from json_lines(file, path)
