"""One recording: read, find the words of both channels, write them beside it."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from finetune.annotation.engines import Engine
from finetune.annotation.recordings import CHANNELS, AudioRecording, read_transcript
from finetune.data.audio.read import read_audio_header, read_channels
from finetune.data.words import SPEAKERS, Word, alignment_entries, load_alignments, look_at_timings
from finetune.errors import DataError

_INAUDIBLE = 1e-3  # a channel whose samples all stay below says nothing; full scale is 1


def is_annotated(recording: AudioRecording) -> bool:
    """Whether there are word timings already.

    Raises:
        DataError: there is a file in their place that cannot be read as such.
    """
    if not os.path.lexists(recording.alignment_path):
        return False
    if "alignments" not in _content(recording.alignment_path, {"alignments": None}):
        return False  # what a data set says of a recording beside it, as LibriLight does
    try:
        load_alignments(recording.alignment_path)
    except DataError as error:
        raise DataError(f"{error} It was there before; --overwrite replaces it.") from error
    return True


def annotate_file(recording: AudioRecording, engine: Engine, *, channels: Sequence[str] = CHANNELS) -> None:
    """Write the word timings of a recording.

    Args:
        recording: a stereo file; or a mono one, whose channel is Moshi's, the left one.
        engine: what finds the words.
        channels: those to annotate, `left` and `right`.

    Raises:
        DataError: the recording or a transcript cannot be used, or the engine rejects them; nothing is
            written.
    """
    if not recording.path.is_file():
        raise DataError("the file does not exist.")
    if read_audio_header(recording.path).channels < len(CHANNELS) and "right" in channels:
        raise DataError("mono, it has no right channel; --channels left annotates its voice as Moshi's.")
    samples = read_channels(recording.path, sample_rate=engine.sample_rate)
    words = {channel: _words(recording, engine, samples, channel) for channel in channels}
    if not any(words.values()):
        raise DataError("no word is heard on either channel." if len(words) == 2 else "no word is heard.")
    write_alignments(recording.alignment_path, words)


def write_alignments(path: Path, words: dict[str, list[Word]]) -> None:
    """Write word timings whole or not at all, as `load_alignments` reads them.

    Args:
        path: of the file; an older one is replaced, but for what else it says of the recording.
        words: per channel, `left` or `right`.

    Raises:
        OSError: it cannot be written; an older file is intact.
    """
    speakers = dict(zip(CHANNELS, SPEAKERS, strict=True))
    entries = alignment_entries(
        word._replace(speaker=speakers[channel]) for channel, spoken in words.items() for word in spoken
    )
    kept = _kept(path)
    # Not .json while it is being written: a killed process leaves nothing that looks like word timings.
    partial = path.with_name(f".alignments.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(kept | {"alignments": entries}, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _kept(path: Path) -> dict[str, Any]:
    """What an older file says besides its words; nothing of one that cannot be read."""
    kept = {key: value for key, value in _content(path, {}).items() if key != "alignments"}
    try:
        look_at_timings(path)
    except DataError:
        kept.pop("text_conditions", None)
    return kept


def _content(path: Path, unreadable: dict[str, Any]) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError):
        return unreadable
    return content if isinstance(content, dict) else unreadable


def _words(recording: AudioRecording, engine: Engine, audio: np.ndarray, channel: str) -> list[Word]:
    samples = audio[CHANNELS.index(channel)]
    transcript = read_transcript(recording, channel) if engine.needs_transcript else None
    is_audible = bool(np.abs(samples).max() >= _INAUDIBLE)
    if not is_audible:
        if transcript and transcript.strip():
            raise DataError(f"{channel} channel: there is a transcript, but nothing is heard.")
        return []
    if engine.needs_transcript and transcript is None:
        path = recording.path.with_suffix(f".{channel}.txt")
        raise DataError(
            f"{channel} channel: no transcript; write what is said into {path.name} beside it, or into the "
            f'manifest\'s field "text".'
        )
    try:
        return engine.words(samples, transcript or "")
    except DataError as error:
        raise DataError(f"{channel} channel: {error}") from error
