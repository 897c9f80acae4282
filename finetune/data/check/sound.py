"""What the samples of a recording show: silence, clipping, channels that are swapped."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finetune.data.check.findings import Finding
from finetune.data.check.sound_levels import CLIPPED_SHARE, SILENCE_DBFS, SILENT_SHARE, WINDOW_SEC, Levels
from finetune.data.words import SPEAKERS, Word

MIN_SWAPPED_WORDS = 5
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
    """Find a recording whose words of Moshi are said on the user's channel.

    Args:
        path: the audio file.
        levels: of it.
        words: of both speakers.
    """
    if len(levels.dbfs) != 2:
        return []
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
