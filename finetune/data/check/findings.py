"""What may be wrong with a data set: the codes, how severe each is, and what to do about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from finetune.errors import one_line

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class FindingKind(NamedTuple):
    """A kind of fault."""

    severity: Severity
    advice: str


# An error is what training refuses or would learn nonsense from; a warning is what it uses in part.
KINDS: dict[str, FindingKind] = {
    "manifest-line": FindingKind("error", 'write the line as {"path": "a.wav", "duration": 12.5}'),
    "manifest-duration": FindingKind("error", "let --fix write the duration"),
    "listed-twice": FindingKind("error", "remove one of the lines"),
    "shared-timings": FindingKind("error", "give each recording a name of its own"),
    "missing": FindingKind("error", "correct the path or remove the line"),
    "not-a-file": FindingKind("error", "put the audio into a file"),
    "unreadable": FindingKind("error", "copy or export it again; wav and flac are fine"),
    "truncated": FindingKind("error", "copy or export it again"),
    "contradiction": FindingKind("error", "export it again"),
    "empty": FindingKind("error", "remove the line or export it again"),
    "check-failed": FindingKind("error", "take the file for damaged: export it again or remove the line"),
    "mono": FindingKind("error", "make it stereo, Moshi left and the user right, or choose --mono"),
    "channels": FindingKind("error", "make it stereo, Moshi left and the user right"),
    "sample-rate": FindingKind("error", "export it again, best with 24,000 samples per second"),
    "duration": FindingKind("error", "let --fix write the duration, or correct the file"),
    "not-finite": FindingKind("error", "export it again"),
    "swapped-channels": FindingKind("error", "swap the channels, or the speakers of the word timings"),
    "no-timings": FindingKind("error", "annotate it (python annotate.py), or train with data.text: none"),
    "no-words": FindingKind("error", "annotate them, name Moshi SPEAKER_MAIN, or train with data.text: none"),
    "malformed-timings": FindingKind("error", "correct it, or annotate again with --overwrite"),
    "word-outside": FindingKind("error", "see that the word timings are of this recording; annotate again"),
    "silent-channel": FindingKind("warning", "see that this voice was recorded"),
    "clipping": FindingKind("warning", "record or export it with a lower level"),
    "word-overlap": FindingKind("warning", "annotate again; the later word may cut the earlier one off"),
    "empty-word": FindingKind("warning", "remove the entries; they say nothing"),
    "word-length": FindingKind("warning", "correct the times; training takes the start for right"),
    "unknown-speaker": FindingKind("warning", "use SPEAKER_MAIN (left) and SPEAKER_USER (right)"),
    "text-cut": FindingKind("warning", "train with data.keep_and_shift: true, or with another tokenizer"),
    "unknown-text": FindingKind("warning", "write it with characters that the tokenizer has"),
    "same-audio": FindingKind("warning", "remove one, unless it is meant to count twice"),
    "resampled": FindingKind("note", "nothing to do; it is resampled to 24,000"),
}


@dataclass(frozen=True)
class Finding:
    """One fault of one file or line.

    Attributes:
        code: a key of `KINDS`.
        path: the file that has it.
        reason: what is wrong, one line without the file's name.
        line: file and number of the manifest's line, where one is known.
    """

    code: str
    path: Path
    reason: str
    line: str | None = None

    @property
    def severity(self) -> Severity:
        """How much it matters."""
        return KINDS[self.code].severity

    @property
    def advice(self) -> str:
        """What to do."""
        return KINDS[self.code].advice


def reason_of_audio(path: Path, error: object) -> str:
    """The same of an error about audio, without its advice: that of the finding's kind follows."""
    reason = reason_of(path, error)
    return reason.rpartition("; ")[0] or reason


def reason_of(path: Path, error: object) -> str:
    """The message of an error about a file in one line, without the file's name before it."""
    return one_line(str(error).removeprefix(f"{path}: "))
