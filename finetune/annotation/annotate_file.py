"""One recording: read, find the words of both channels, write them beside it."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from finetune.annotation.engines import Engine
from finetune.annotation.recordings import CHANNELS, AudioRecording, read_transcript
from finetune.data.audio.read import read_audio
from finetune.data.words import SPEAKERS, Word, load_alignments, load_transcript
from finetune.errors import DataError

_INAUDIBLE = 1e-3  # a channel whose samples all stay below says nothing; full scale is 1


def is_annotated(recording: AudioRecording) -> bool:
    """Whether there are word timings already.

    Raises:
        DataError: there is a file in their place that cannot be read as such.
    """
    if not os.path.lexists(recording.alignment_path):
        return False
    try:
        load_alignments(recording.alignment_path)
    except DataError as error:
        raise DataError(f"{error} It was there before; --overwrite replaces it.") from error
    return True


def annotate_file(recording: AudioRecording, engine: Engine, *, channels: Sequence[str] = CHANNELS) -> None:
    """Write the word timings of a recording.

    Args:
        recording: a stereo file.
        engine: what finds the words.
        channels: those to annotate, `left` and `right`.

    Raises:
        DataError: the recording or a transcript cannot be used, or the engine rejects them; nothing is
            written.
    """
    if not recording.path.is_file():
        raise DataError("the file does not exist.")
    stereo = read_audio(recording.path, sample_rate=engine.sample_rate)
    words = {channel: _words(recording, engine, stereo, channel) for channel in channels}
    if not any(words.values()):
        raise DataError("no word is heard on either channel." if len(words) == 2 else "no word is heard.")
    write_alignments(recording.alignment_path, words)


def write_alignments(path: Path, words: dict[str, list[Word]]) -> None:
    """Write word timings whole or not at all, as `load_alignments` reads them.

    Args:
        path: of the file; an older one is replaced, but for its text conditions.
        words: per channel, `left` or `right`.

    Raises:
        OSError: it cannot be written; an older file is intact.
    """
    speakers = dict(zip(CHANNELS, SPEAKERS, strict=True))
    ordered = sorted(
        ((word, speakers[channel]) for channel, spoken in words.items() for word in spoken),
        key=lambda entry: round(entry[0].start_sec, 3),
    )
    entries = [
        [word.text, [round(word.start_sec, 3), round(word.end_sec, 3)], speaker] for word, speaker in ordered
    ]
    kept = _text_conditions(path)
    # Not .json while it is being written: a killed process leaves nothing that looks like word timings.
    partial = path.with_name(f".alignments.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"alignments": entries} | kept, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _text_conditions(path: Path) -> dict[str, dict[str, str]]:
    """The part of an older file that nobody hears in the recording; nothing of one that cannot be read."""
    try:
        conditions = load_transcript(path).text_conditions
    except DataError:
        return {}
    return {"text_conditions": conditions} if conditions else {}


def _words(recording: AudioRecording, engine: Engine, stereo: np.ndarray, channel: str) -> list[Word]:
    samples = stereo[CHANNELS.index(channel)]
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
