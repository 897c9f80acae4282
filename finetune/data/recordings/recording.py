"""A recording of a data set, where a manifest lists it, and what may be wrong with it."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Recording:
    """One stereo recording: left channel Moshi, right channel the user.

    Attributes:
        path: The audio file.
        duration_sec: Its length in seconds as the manifest states it.
        alignment_path: Word timings, the file beside the audio with the suffix ``.json``.
        line: Where a manifest lists it, None when it comes from elsewhere.
        source: Which of several sources it comes from.
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
        """Returns a fault of this recording."""
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
        manifest: Its file.
        line: Its number, from 1.
        path: The audio file, empty when the line names none.
        reason: In one line, without the manifest.
        key: Configuration key or option, for messages.
    """

    manifest: str
    line: int
    path: str
    reason: str
    key: str

    @property
    def identity(self) -> tuple[str, int, str]:
        """See ``Recording.identity``."""
        return self.manifest, self.line, self.path

    @property
    def message(self) -> str:
        """Where it is and what it is."""
        return f"{self.key}: {self.manifest} line {self.line}: {self.reason}" if self.line else self.reason
