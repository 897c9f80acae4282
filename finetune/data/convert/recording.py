"""One recording of others as `NAME.wav` and `NAME.json` with its words, the latter written last."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.audio.checks import MAX_MISSING_SEC
from finetune.data.audio.read import read_audio_header, read_channels, read_pieces
from finetune.data.audio.voiced import estimate_words, find_voice
from finetune.data.check.fast import count_outside
from finetune.data.convert.source import SourceRecording, Track, Untimed
from finetune.data.convert.wav_file import cut_out, write_wav
from finetune.data.words import SPEAKERS, Word, alignment_entries
from finetune.errors import DataError
from finetune.files import hash_json
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.regular_file import read_text

CONVERTED_KEY = "converted_from"


def convert_recording(recording: SourceRecording, path: Path) -> bool:
    """Write the files of a recording, unless they are there and nothing of the source has changed since.

    Args:
        recording: what to convert.
        path: of the wav file.

    Returns:
        Whether they were there.

    Raises:
        DataError: an audio file or the words cannot be used; nothing is written.
        OSError: a file cannot be written.
    """
    digest = _digest(recording)
    if path.is_file() and _converted_from(path.with_suffix(".json")) == digest:
        return True
    rate = _sample_rate(recording)
    words = [*recording.words]
    for untimed in recording.untimed:
        words += _estimated(recording, untimed, rate)
    channels = len(recording.tracks)
    num_samples = write_wav(path, _pieces(recording, rate), channels=channels, sample_rate=rate)
    try:
        _check(recording, words, num_samples / rate)
    except DataError:
        path.unlink()
        raise
    content: dict[str, Any] = {CONVERTED_KEY: digest}
    if not recording.transcript:
        content = {"alignments": alignment_entries(words)} | content
    with replacing(path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return False


def _digest(recording: SourceRecording) -> str:
    """Of all that the files are made from; audio files count by their size and time of change."""
    files = []
    for track in recording.tracks:
        try:
            stat = track.path.stat()
        except OSError as error:
            raise DataError(f"{track.path}: cannot be read ({error.strerror}).") from None
        files.append([str(track.path.absolute()), stat.st_size, stat.st_mtime_ns])
    said = {
        key: value
        for key, value in asdict(recording).items()
        if key not in ("where", "tracks", "num_outside")
    }
    return hash_json([files, [track.channel for track in recording.tracks], said])


def _converted_from(path: Path) -> object:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get(CONVERTED_KEY) if isinstance(content, dict) else None


def _sample_rate(recording: SourceRecording) -> int:
    rates = set()
    for track in recording.tracks:
        header = read_audio_header(track.path)
        rates.add(int(header.sample_rate))
        if track.channel is None and header.channels != 1:
            raise DataError(
                f"{track.path}: has {header.channels} channels, and nothing says which of them it "
                "is; make it mono."
            )
        if track.channel is not None and track.channel >= header.channels:
            raise DataError(
                f"{track.path}: has {header.channels} channel, the recording needs {track.channel + 1}."
            )
    if len(rates) > 1:
        raise DataError("its audio files have different sample rates; make them the same.")
    return rates.pop()


def _pieces(recording: SourceRecording, rate: int) -> Iterator[np.ndarray]:
    """The samples [channels, n] of its tracks."""
    start = round(recording.start_sec * rate)
    length = recording.duration_sec
    stop = None if length is None else round((recording.start_sec + length) * rate)
    first = recording.tracks[0].path
    rows = [track.channel or 0 for track in recording.tracks]
    if all(track.path == first for track in recording.tracks):
        pieces = (piece[rows] for piece in read_pieces(first, sample_rate=rate))
        return cut_out(pieces, start=start, stop=stop)
    return cut_out([_side_by_side(recording.tracks, rate)], start=start, stop=stop)


def _side_by_side(tracks: tuple[Track, ...], rate: int) -> np.ndarray:
    voices = [read_channels(track.path, sample_rate=rate)[track.channel or 0] for track in tracks]
    if len({len(voice) for voice in voices}) > 1:
        lengths = " and ".join(f"{len(voice) / rate:.2f} s" for voice in voices)
        raise DataError(f"its audio files last {lengths}; make them of one length.")
    return np.stack(voices)


def _estimated(recording: SourceRecording, untimed: Untimed, rate: int) -> list[Word]:
    """Its words with times that are estimated from the letters and the voice."""
    samples = np.concatenate([piece[untimed.track] for piece in _pieces(recording, rate)])
    start = round(untimed.start_sec * rate)
    stop = None if untimed.end_sec is None else round(untimed.end_sec * rate)
    try:
        words = estimate_words(untimed.text, find_voice(samples[start:stop], sample_rate=rate))
    except DataError as error:
        raise DataError(f"no times can be estimated: it {error}") from None
    begin = start / rate
    return [
        Word(word.text, word.start_sec + begin, word.end_sec + begin, SPEAKERS[untimed.track])
        for word in words
    ]


def _check(recording: SourceRecording, words: list[Word], duration_sec: float) -> None:
    if not duration_sec:
        raise DataError("holds no samples.")
    expected = recording.duration_sec
    if expected is not None and duration_sec < expected - MAX_MISSING_SEC:
        raise DataError(f"the audio ends {expected - duration_sec:.2f} s before the cut does.")
    outside = count_outside(((word.start_sec, word.end_sec) for word in words), duration_sec=duration_sec)
    if outside:
        raise DataError(
            f"{outside} of {len(words)} words lie behind the end of the audio, {duration_sec:.2f} s."
        )
