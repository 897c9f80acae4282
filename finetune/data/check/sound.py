"""What the samples of a recording show: silence, clipping, channels that are swapped."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.data.check.findings import Finding
from finetune.data.check.sound_levels import CLIPPED_SHARE, SILENCE_DBFS, SILENT_SHARE, WINDOW_SEC, Levels
from finetune.data.words import SPEAKERS, Word

MIN_SWAPPED_WORDS = 5
MIN_SWAPPED_DB = 6.0
_SHORTEST_WORD_SEC = 0.2  # where only starts are known
_SIDES = ("left", "right")
_NAMES = {1: ("the only",), 2: ("the left", "the right")}


def check_levels(path: Path, levels: Levels) -> list[Finding]:
    """Find channels that are silent all the time, and those with many samples at full scale."""
    findings = []
    names = _NAMES[len(levels.dbfs)]
    silent = [name for i, name in enumerate(names) if levels.silent_share(i) >= SILENT_SHARE]
    if silent:
        reason = f"{' and '.join(silent)} channel below {SILENCE_DBFS:g} dBFS for the whole length"
        findings.append(Finding("silent-channel", path, reason))
    shares = [(name, levels.clipped_share(i)) for i, name in enumerate(names)]
    clipped = [f"{share:.2%} of {name} channel" for name, share in shares if share >= CLIPPED_SHARE]
    if clipped:
        findings.append(Finding("clipping", path, f"{', '.join(clipped)} at full scale"))
    return findings


def check_swapped(path: Path, levels: Levels, words: Sequence[Word]) -> list[Finding]:
    """Find a recording whose words are said on the other speaker's channel.

    Args:
        path: the audio file.
        levels: of it.
        words: of both speakers.
    """
    if len(levels.dbfs) != 2:
        return []
    return _heard_elsewhere(path, levels, words) or _matches_elsewhere(path, levels, words)


def _heard_elsewhere(path: Path, levels: Levels, words: Sequence[Word]) -> list[Finding]:
    """Most words of Moshi are said while only the user's channel has a voice."""
    left, right = levels.voiced(0), levels.voiced(1)
    count = swapped = 0
    for word in words:
        first = int(word.start_sec / WINDOW_SEC) if word.start_sec < len(left) * WINDOW_SEC else len(left)
        last = min(len(left), int(np.ceil(min(word.end_sec, len(left) * WINDOW_SEC) / WINDOW_SEC)))
        if word.speaker != SPEAKERS[0] or first >= last:
            continue
        count += 1
        swapped += left[first:last].mean() < 0.5 <= right[first:last].mean()
    if swapped < MIN_SWAPPED_WORDS or swapped <= count / 2:
        return []
    reason = f"{swapped} of {count} words of {SPEAKERS[0]} are heard on the right channel only"
    return [Finding("swapped-channels", path, reason)]


def _matches_elsewhere(path: Path, levels: Levels, words: Sequence[Word]) -> list[Finding]:
    """The words of each speaker fit the other's channel, also where both have a voice all the time.

    While a speaker says words, that speaker's channel is louder than at other times, whoever else speaks
    meanwhile; so each channel is compared with itself.
    """
    loud = np.maximum(levels.dbfs, SILENCE_DBFS)
    gains, reasons = [], []
    for channel, speaker in enumerate(SPEAKERS):
        said, count = _windows_of(words, speaker, loud.shape[1])
        if count < MIN_SWAPPED_WORDS or not 0 < said.mean() < 1:
            continue
        own, other = (float(loud[i, said].mean() - loud[i, ~said].mean()) for i in (channel, 1 - channel))
        gains.append(other - own)
        reasons.append(
            f"at {count} words of {speaker} the {_SIDES[1 - channel]} channel is {other:.0f} dB louder than "
            f"at other times, the {_SIDES[channel]} one {own:.0f} dB"
        )
    # One speaker's words may be placed badly; both together must speak for it.
    if not gains or min(gains) < 0 or sum(gains) / len(gains) < MIN_SWAPPED_DB:
        return []
    return [Finding("swapped-channels", path, "; ".join(reasons))]


def _windows_of(words: Sequence[Word], speaker: str, num_windows: int) -> tuple[np.ndarray, int]:
    """In which windows a speaker says words, bool `[windows]`, and how many words these are."""
    said = np.zeros(num_windows, bool)
    count = 0
    for word in words:
        if word.speaker != speaker or word.start_sec >= num_windows * WINDOW_SEC:
            continue
        end_sec = max(word.end_sec, word.start_sec + _SHORTEST_WORD_SEC)
        last = int(np.ceil(min(end_sec, num_windows * WINDOW_SEC) / WINDOW_SEC))
        said[int(word.start_sec / WINDOW_SEC) : last] = True
        count += 1
    return said, count
