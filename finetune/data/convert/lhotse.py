"""Cuts of lhotse, `cuts.jsonl` or `cuts.jsonl.gz`, read as the JSON that they are: lhotse is not needed.

A cut is a stretch of a recording, of one channel (`MonoCut`) or several (`MultiCut`). Its supervisions say
who speaks on which channel; the times of their words (`alignment`) count from the start of the recording, not
of the cut (https://lhotse.readthedocs.io/en/latest/cuts.html, `AlignmentItem`, `Cut.trim_to_alignments`).
"""

import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.convert.source import (
    Source,
    SourceFault,
    SourceRecording,
    Track,
    Untimed,
    entries,
    json_lines,
    number,
    seconds,
    text,
)
from finetune.data.words import SPEAKERS, Word
from finetune.errors import DataError
from moshi_ttt.files.regular_file import regular_only

_MONO, _MULTI = ("MonoCut", "Cut"), ("MultiCut",)


@dataclass(frozen=True)
class CutOptions:
    """How cuts are read.

    Attributes:
        alignment: which of a supervision's alignments holds its words.
        moshi_channel: which of two channels is Moshi; None: the first.
        audio_root: where relative paths of audio files start.
        estimate: estimate the times of words of supervisions without an alignment.
    """

    alignment: str = "word"
    moshi_channel: int | None = None
    audio_root: Path = Path()
    estimate: bool = False


def read_cuts(source: Path, options: CutOptions) -> Source:
    """Yield the cuts of a manifest in its order.

    Raises:
        DataError: the file cannot be read.
    """
    for line, fields in json_lines(_lines(source), source):
        where = f"{source} line {line}"
        try:
            if isinstance(fields, DataError):
                raise fields
            yield _recording(fields, where=where, options=options)
        except DataError as error:
            yield SourceFault(where, str(error))


def _lines(source: Path) -> Iterator[str]:
    if not source.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{source}: is no manifest of cuts, .jsonl or .jsonl.gz.")
    try:
        with open(source, "rb", opener=regular_only) as file:
            content = gzip.GzipFile(fileobj=file) if source.suffix == ".gz" else file
            yield from io.TextIOWrapper(content, encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error}).") from None


def _recording(cut: dict[str, Any], *, where: str, options: CutOptions) -> SourceRecording:
    channels = _channels(cut)
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise DataError('the cut has no "recording"; features alone cannot be converted.')
    if recording.get("transforms"):
        raise DataError(
            "the recording has transforms, which lhotse applies when it loads; save the audio first."
        )
    if len(channels) == 2 and options.moshi_channel is not None:
        if options.moshi_channel not in channels:
            raise DataError(f"--moshi-channel {options.moshi_channel} is none of its channels, {channels}.")
        channels.sort(key=lambda channel: channel != options.moshi_channel)
    start, duration = number(cut, "start"), number(cut, "duration")
    words: list[Word] = []
    untimed: list[Untimed] = []
    speakers = set()
    num_outside = 0
    for supervision in entries(cut.get("supervisions"), '"supervisions"'):
        track = _track_of(supervision, channels)
        speakers.add(supervision.get("speaker"))
        timed = _words(supervision, options, cut_start=start, speaker=SPEAKERS[track])
        if timed is not None:
            inside = [word for word in timed if 0 <= word.start_sec < duration]
            words += [word._replace(end_sec=min(word.end_sec, duration)) for word in inside]
            num_outside += len(timed) - len(inside)
        elif supervision.get("text"):
            untimed.append(_untimed(supervision, track, options, duration=duration))
    (only,) = speakers if len(speakers) == 1 and len(channels) == 1 else ("",)
    return SourceRecording(
        where,
        text(cut, "id"),
        tuple(_track(recording, channel, options) for channel in channels),
        tuple(words),
        tuple(untimed),
        start_sec=start,
        duration_sec=duration,
        speaker=only if isinstance(only, str) else "",
        num_outside=num_outside,
    )


def _channels(cut: dict[str, Any]) -> list[int]:
    kind, channel = cut.get("type"), cut.get("channel")
    if kind not in (*_MONO, *_MULTI):
        raise DataError(f'"type": {kind!r} is neither a MonoCut nor a MultiCut; save its audio and cut that.')
    channels = channel if isinstance(channel, list) else [channel]
    if not all(type(entry) is int for entry in channels) or len(set(channels)) not in (1, 2):
        raise DataError(f'"channel" must name one channel or two, not {channel!r}.')
    return list(dict.fromkeys(channels))


def _track(recording: dict[str, Any], channel: int, options: CutOptions) -> Track:
    for source in entries(recording.get("sources"), '"sources"'):
        held = source.get("channels")
        if isinstance(held, list) and channel in held:
            if source.get("type") != "file":
                raise DataError(f"the audio is a {source.get('type')!r}, not a file; save it as one.")
            path = options.audio_root / text(source, "source")
            if not path.is_file():
                raise DataError(f"{path} does not exist; --audio-root says where relative paths start.")
            return Track(path, held.index(channel) if len(held) > 1 else None)
    raise DataError(f"none of the recording's sources holds channel {channel}.")


def _track_of(supervision: dict[str, Any], channels: Sequence[int]) -> int:
    """Which of the cut's tracks a supervision is of."""
    if len(channels) == 1:
        return 0
    channel = supervision.get("channel", 0)
    if isinstance(channel, list) and len(channel) == 1:
        (channel,) = channel
    if channel not in channels:
        raise DataError(
            f"supervision {supervision.get('id')!r} is of channel {channel!r}, which does not say whose "
            "words they are."
        )
    return channels.index(channel)


def _words(
    supervision: dict[str, Any], options: CutOptions, *, cut_start: float, speaker: str
) -> list[Word] | None:
    """Its words with times from the start of the cut; None where it has no alignment."""
    alignments = supervision.get("alignment") or {}
    items = alignments.get(options.alignment) if isinstance(alignments, dict) else None
    if items is None:
        return None
    if not isinstance(items, list):
        raise DataError(f"the alignment {options.alignment!r} must be a list.")
    words = []
    for item in items:
        values = (
            [item.get(key) for key in ("symbol", "start", "duration")] if isinstance(item, dict) else item
        )
        if not isinstance(values, list) or len(values) < 3 or not isinstance(values[0], str):
            raise DataError(
                f'the alignment {options.alignment!r}: expected ["word", start, duration], not {item!r}.'
            )
        begin, length = (seconds(value, "a time of the alignment") for value in values[1:3])
        if values[0].strip():  # blank ones are pauses
            words.append(Word(values[0].strip(), begin - cut_start, begin + length - cut_start, speaker))
    return words


def _untimed(supervision: dict[str, Any], track: int, options: CutOptions, *, duration: float) -> Untimed:
    if not options.estimate:
        raise DataError(
            f"supervision {supervision.get('id')!r} has a text but no alignment {options.alignment!r} with "
            "the times of its words; --times estimate estimates them, --alignment names another."
        )
    start = supervision.get("start")
    if isinstance(start, bool) or not isinstance(start, int | float):
        raise DataError('"start" of a supervision must be a number of seconds.')
    end = min(start + number(supervision, "duration"), duration)
    return Untimed(text(supervision, "text"), max(0.0, float(start)), end, track)
