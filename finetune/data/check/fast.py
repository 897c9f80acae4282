"""What can be said of a recording without decoding it, fast enough for the start of a training run.

All that is found here `finetune.data.check` finds too, under the same codes.
"""

import json
import math
import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from finetune.data.args import TextOptions
from finetune.data.audio.checks import AudioHeader, check_duration
from finetune.data.audio.read import audio_kind, read_audio_header
from finetune.data.check.findings import Finding, reason_of, reason_of_audio
from finetune.data.codes.mono import MonoPolicy, mono_error
from finetune.data.recordings.lines import Recording
from finetune.data.words import load_alignments, look_at_timings
from finetune.errors import DataError
from moshi_ttt.files.regular_file import read_text

MONO: tuple[MonoPolicy, ...] = get_args(MonoPolicy)
# Aligners count in frames of some 10 ms, and words fade out.
MAX_LATE_SEC = 0.5
_NUMBERS = (float, int)


_GIVEN = TextOptions()


def check_fast(
    recording: Recording, *, mono: MonoPolicy = "error", text: TextOptions = _GIVEN
) -> list[Finding]:
    """Look at a recording's files and the audio's header, and read its word timings.

    Args:
        recording: a line of a manifest; its files need not exist.
        mono: what training does with a mono file; anything but `error` accepts it.
        text: what training does with words; without them, there need be no file beside the audio.

    Returns:
        What is wrong, at most one finding of a code. Lengths are compared where the header is exact: wav,
        flac and Ogg-Opus.
    """
    finding = find_file(recording.path)
    if finding is not None:
        return [finding]
    findings, duration_sec = _check_header(recording, mono=mono)
    if text.text == "none":
        return findings + _check_conditions(recording.alignment_path)
    return findings + _check_timings(recording.alignment_path, duration_sec)


def refuse_faulty(recording: Recording, *, mono: MonoPolicy, text: TextOptions) -> None:
    """Raise the first error that `check_fast` finds, if any, as DataError."""
    for finding in check_fast(recording, mono=mono, text=text):
        if finding.code == "mono":
            raise mono_error(recording.path)
        if finding.severity == "error":
            advice = finding.advice.replace("--fix", "`python -m finetune.data.check --fix`")
            raise DataError(
                f"{finding.path}: {finding.reason.removesuffix('.')}; {advice}.", code=finding.code
            )


def _check_header(recording: Recording, *, mono: MonoPolicy) -> tuple[list[Finding], float | None]:
    """What is wrong with the audio; and its length in seconds, None where no header says it exactly."""
    path = recording.path
    try:
        is_exact = audio_kind(path) != "other"
        header = read_audio_header(path)
    except DataError as error:
        return [Finding(error.code or "unreadable", path, reason_of_audio(path, error))], None
    findings = check_channels(path, header, mono=mono)
    if not is_exact:
        return findings, None
    if header.num_samples == 0:
        return [*findings, Finding("empty", path, "holds no samples")], None
    duration_sec = header.num_samples / header.sample_rate
    return findings + compare_duration(recording, duration_sec), duration_sec


def find_file(path: Path, *, missing: str = "missing", no_file: str = "not-a-file") -> Finding | None:
    """What is wrong with a file before it is opened: it is not there, or is a folder, a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        reason = getattr(error, "strerror", None) or error
        return Finding(missing, path, f"cannot be found ({reason})")
    if stat.S_ISREG(mode):
        return None
    what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
    return Finding(no_file, path, f"is {what}, not a file")


def check_channels(path: Path, header: AudioHeader, *, mono: MonoPolicy) -> list[Finding]:
    """See that there are two channels, or one where that is accepted."""
    if header.channels == 1 and mono == "error":
        return [Finding("mono", path, "is mono, which has no place for two voices")]
    return []


def compare_duration(recording: Recording, duration_sec: float) -> list[Finding]:
    """Compare a length with the manifest's, as training does; with one of NaN nothing is compared."""
    if math.isnan(recording.duration_sec):
        return []
    try:
        check_duration(recording.path, duration_sec, expected_duration_sec=recording.duration_sec)
    except DataError as error:
        reason = reason_of(recording.path, error).partition(";")[0]
        return [Finding("duration", recording.path, reason)]
    return []


def count_outside(spans: Iterable[tuple[float, float]], *, duration_sec: float) -> int:
    """How many words are said where the recording has ended: they start there, or end well behind it."""
    latest_end = duration_sec + MAX_LATE_SEC
    return sum(start >= duration_sec or end > latest_end for start, end in spans)


def _check_conditions(path: Path) -> list[Finding]:
    """What is wrong with a file that may say more than words, or not be there."""
    try:
        if path.exists():
            look_at_timings(path)
    except (DataError, OSError) as error:
        return [Finding("malformed-timings", path, reason_of(path, error))]
    return []


def _check_timings(path: Path, duration_sec: float | None) -> list[Finding]:
    finding = find_file(path, missing="no-timings", no_file="malformed-timings")
    if finding is not None:
        return [finding]
    try:
        spans = _plain_spans(path)
        if spans is None:
            spans = [(word.start_sec, word.end_sec) for word in load_alignments(path)]
    except DataError as error:
        return [Finding("malformed-timings", path, reason_of(path, error))]
    if duration_sec is None or not spans:
        return []
    count = count_outside(spans, duration_sec=duration_sec)
    return [outside_finding(path, count, len(spans), duration_sec)] if count else []


def outside_finding(path: Path, count: int, total: int, duration_sec: float) -> Finding:
    """What is said of words outside the audio."""
    reason = f"{count} of {total} words lie behind the end of the audio, {duration_sec:.2f} s"
    return Finding("word-outside", path, reason)


def _plain_spans(path: Path) -> list[tuple[float, float]] | None:
    """The times of all words, checked five times as fast as `load_alignments` does.

    Returns:
        None where anything is unusual, also if it may be right: then `load_alignments` is to judge.
    """
    largest = sys.float_info.max
    spans = []
    try:
        text = read_text(path)
        content = json.loads(text)
        entries = content["alignments"]
        if content.get("text_conditions") is not None or type(entries) is not list:
            return None
        if "\\u0000" in text or "\\ud" in text or "\\uD" in text:
            return None
        for word, span, speaker in entries:
            start, end = span
            if not (type(word) is type(speaker) is str and type(span) is list):
                return None
            if type(start) not in _NUMBERS or type(end) not in _NUMBERS:
                return None
            if not (0 <= start <= largest and 0 <= end <= largest):
                return None
            spans.append((start, end))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return spans
