"""The findings of a check as text for people and as JSON for programs."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.audio.find import printable
from finetune.data.batches.interleaver import TextCount
from finetune.data.check.data_set import CheckedLine
from finetune.data.check.findings import SEVERITIES, Finding
from finetune.data.recordings.lines import Recording
from finetune.data.text_report import share_text
from moshi_ttt.files.atomic_file import replacing


def text_report(items: Sequence[CheckedLine], findings: Sequence[Finding], *, left_out: Sequence[str]) -> str:
    """A table per severity and a summary in the last line.

    Args:
        items: all lines of the manifest.
        findings: sorted by severity.
        left_out: checks that were not made, with the reason.
    """
    lines = []
    for severity in SEVERITIES:
        found = [finding for finding in findings if finding.severity == severity]
        if found:
            rows = _notes(found) if severity == "note" else _table(found)
            lines += [f"{_plural(len(found), severity)}:", *rows, ""]
    lines += [f"left out: {what}" for what in left_out]
    texts = [item.checked.text for item in items if item.checked.text is not None]
    if texts:
        count = sum(texts, TextCount())
        lines.append(f"{_plural(count.words, 'word')} of Moshi; {share_text(count)}")
    return "\n".join([*lines, summary(items, findings)])


def summary(items: Sequence[CheckedLine], findings: Sequence[Finding]) -> str:
    """How much was checked and found, in one line."""
    seconds = sum(item.checked.duration_sec or 0.0 for item in items)
    counts = Counter(finding.severity for finding in findings)
    found = ", ".join(_plural(counts[severity], severity) for severity in SEVERITIES)
    return f"{_plural(len(items), 'line')}, {seconds / 3600:.2f} h of audio: {found}"


def write_json_report(path: Path, items: Sequence[CheckedLine], findings: Sequence[Finding]) -> None:
    """Write findings and what is known of each recording, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    counts = Counter(finding.severity for finding in findings)
    content = {
        "summary": {"lines": len(items)} | {severity: counts[severity] for severity in SEVERITIES},
        "findings": [_finding_record(finding) for finding in findings],
        "recordings": [
            _recording_record(item, item.recording) for item in items if item.recording is not None
        ],
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def short_name(path: Path) -> str:
    """A path in one line, relative to the current folder where it lies in it."""
    relative = os.path.relpath(path) if "\0" not in str(path) else str(path)
    return printable(str(path) if relative.startswith("..") else relative)


def _table(findings: Sequence[Finding]) -> list[str]:
    width = max(len(finding.code) for finding in findings)
    lines = []
    for finding in findings:
        where = "" if finding.line is None else f" ({short_name(Path(finding.line))})"
        what = f"{printable(finding.reason)}; {finding.advice}"
        lines.append(f"  {finding.code.ljust(width)}  {short_name(finding.path)}{where}: {what}.")
    return lines


def _notes(findings: Sequence[Finding]) -> list[str]:
    """One line for all that are alike: nothing is to be done about them."""
    lines = []
    for code, count in Counter(finding.code for finding in findings).items():
        first = next(finding for finding in findings if finding.code == code)
        others = f" (and {count - 1} others)" if count > 1 else ""
        what = f"{printable(first.reason)}; {first.advice}"
        lines.append(f"  {code}  {short_name(first.path)}{others}: {what}.")
    return lines


def _finding_record(finding: Finding) -> dict[str, Any]:
    return {
        "severity": finding.severity,
        "code": finding.code,
        "file": str(finding.path),
        "line": finding.line,
        "reason": finding.reason,
        "advice": finding.advice,
    }


def _recording_record(item: CheckedLine, recording: Recording) -> dict[str, Any]:
    checked = item.checked
    return {
        "file": str(recording.path),
        "line": item.where,
        "duration_sec": checked.duration_sec,
        "voiced_share": checked.voiced,
        "words_per_minute": checked.words_per_minute,
        "text_tokens": None if checked.text is None else checked.text.tokens,
        "text_tokens_placed": None if checked.text is None else checked.text.placed,
    }


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
