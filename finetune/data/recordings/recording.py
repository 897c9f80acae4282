"""A recording of a data set, where a manifest lists it, and what may be wrong with it."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Recording:
    """One stereo recording: left channel Moshi, right channel the user.

    Attributes:
        path: the audio file.
        duration_sec: its length in seconds as the manifest states it.
        alignment_path: word timings, the file beside the audio with the suffix `.json`.
        line: where a manifest lists it, None when it comes from elsewhere.
        source: which of several sources it comes from.
    """

    path: Path
    duration_sec: float
    alignment_path: Path
    line: "Line | None" = field(default=None, compare=False)
    source: int = field(default=0, compare=False)

    @property
    def identity(self) -> tuple[str, int, str]:
        """Manifest, line and audio file."""
        manifest, number = ("", 0) if self.line is None else (str(self.line.manifest), self.line.number)
        return manifest, number, str(self.path)

    def fault(self, reason: str) -> "Fault":
        """A fault of this recording."""
        return Fault(*self.identity, reason, self.line.key if self.line is not None else "")


@dataclass(frozen=True)
class Line:
    """A line of a manifest, numbered from 1, and the configuration key that led to it."""

    manifest: Path
    number: int
    key: str

    def __str__(self) -> str:
        """For messages."""
        return f"{self.key}: {self.manifest} line {self.number}"


@dataclass(frozen=True)
class Fault:
    """Why a line of a manifest cannot be used.

    Attributes:
        manifest: its file.
        line: its number, from 1.
        path: the audio file, empty when the line names none.
        reason: in one line, without the manifest.
        key: configuration key or option, for messages.
    """

    manifest: str
    line: int
    path: str
    reason: str
    key: str

    @property
    def identity(self) -> tuple[str, int, str]:
        """See `Recording.identity`."""
        return self.manifest, self.line, self.path

    @property
    def message(self) -> str:
        """Where it is and what it is."""
        return f"{self.key}: {self.manifest} line {self.line}: {self.reason}" if self.line else self.reason


def noted_before(noted: dict[str, _T], path: Path, value: _T) -> _T | None:
    """Tell a file that was met before: an audio file that is listed twice, or word timings that are shared.

    Args:
        noted: what was noted so far, by file.
        path: the file.
        value: noted with it when it is met for the first time.

    Returns:
        What was noted at the first time; None where this is it.
    """
    # Not resolve(): in a downloaded snapshot, different recordings may be links to one blob.
    identity = os.path.abspath(path)
    if identity in noted:
        return noted[identity]
    noted[identity] = value
    return None
