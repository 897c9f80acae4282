"""What the word timings of a recording show."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from finetune.data.batches.interleaver import TextCount
from finetune.data.check.fast import count_outside, outside_finding
from finetune.data.check.findings import Finding
from finetune.data.text_report import share_text
from finetune.data.words import SPEAKERS, Word

# Aligners round the end of a word and the start of the next one apart.
MAX_OVERLAP_SEC = 0.05
MAX_LOST_SHARE = 0.05


def check_words(path: Path, words: Sequence[Word], *, duration_sec: float | None) -> list[Finding]:
    """Find words outside the audio, without text, of unknown speakers, over each other, or backwards.

    A word without a length is right: only its start counts.

    Args:
        path: the file of the word timings.
        words: sorted by their start.
        duration_sec: length of the audio, None where it is not known.
    """
    findings = []
    if duration_sec is not None:
        outside = count_outside(((w.start_sec, w.end_sec) for w in words), duration_sec=duration_sec)
        if outside:
            findings.append(outside_finding(path, outside, len(words), duration_sec))
    empty = [word for word in words if not word.text.strip()]
    findings += _summary("empty-word", path, "have no text", empty, words)
    backwards = [word for word in words if word.end_sec < word.start_sec]
    findings += _summary("word-length", path, "end before they start", backwards, words)
    strangers = [word for word in words if word.speaker not in SPEAKERS]
    if strangers:
        names = sorted({word.speaker for word in strangers})
        shown = ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")
        what = f"are of unknown speakers, {shown}"
        findings += _summary("unknown-speaker", path, what, strangers, words)
    return findings + _summary("word-overlap", path, "start before the one before ends", _late(words), words)


def check_text(path: Path, words: Sequence[Word], is_known: Callable[[str], bool]) -> list[Finding]:
    """Find words of Moshi that the tokenizer cannot spell.

    Args:
        path: the file of the word timings.
        words: of all speakers.
        is_known: whether a text becomes tokens that all stand for something.
    """
    spoken = [word for word in words if word.speaker == SPEAKERS[0]]
    unknown = [word for word in spoken if not is_known(word.text)]
    return _summary("unknown-text", path, "have characters that the tokenizer does not know", unknown, spoken)


def check_placing(path: Path, count: TextCount) -> list[Finding]:
    """Find text of which much does not reach the text stream.

    Args:
        path: the file of the word timings.
        count: of its text.
    """
    if count.tokens - count.placed < MAX_LOST_SHARE * count.tokens or not count.tokens:
        return []
    return [Finding("text-cut", path, f"{share_text(count)}, the others found no frame")]


def _late(words: Iterable[Word]) -> list[Word]:
    """Words that start before another word of the same speaker has ended."""
    late = []
    ends: dict[str, float] = {}
    for word in words:
        end_sec = ends.get(word.speaker, 0.0)
        if word.start_sec < end_sec - MAX_OVERLAP_SEC:
            late.append(word)
        ends[word.speaker] = max(end_sec, word.end_sec)
    return late


def _summary(code: str, path: Path, what: str, found: Sequence[Word], words: Sequence[Word]) -> list[Finding]:
    if not found:
        return []
    first = f"the first is {found[0].text[:40]!r} at {found[0].start_sec:.2f} s"
    return [Finding(code, path, f"{len(found)} of {len(words)} words {what}; {first}")]
