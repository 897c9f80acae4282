"""Writes decoded durations into a manifest and changes nothing else in it."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from finetune.data.check.data_set import CheckedLine
from finetune.errors import DataError
from moshi_ttt.files.atomic_file import replacing

FIXABLE = frozenset({"duration", "manifest-duration"})


def fix_durations(items: Iterable[CheckedLine]) -> dict[Path, Path]:
    """Correct the lines whose duration is missing, malformed or not that of the file.

    Args:
        items: checked lines. Those whose audio could not be decoded keep what they say.

    Returns:
        The backup (`NAME.bak`, or `NAME.bak-2` and so on where there is one) of each manifest that was
        rewritten.

    Raises:
        DataError: a manifest was changed since it was read.
        OSError: a file cannot be written; the manifest is intact.
    """
    by_manifest: dict[Path, list[CheckedLine]] = {}
    for item in items:
        if is_fixable(item):
            by_manifest.setdefault(item.line.manifest, []).append(item)
    return {manifest: _rewrite(manifest, wrong) for manifest, wrong in by_manifest.items()}


def is_fixable(item: CheckedLine) -> bool:
    """Whether a line's duration is wrong and the right one is known."""
    codes = {finding.code for finding in item.checked.findings}
    return item.checked.duration_sec is not None and bool(FIXABLE & codes)


def _rewrite(manifest: Path, items: Iterable[CheckedLine]) -> Path:
    lines = manifest.read_bytes().split(b"\n")
    for item in items:
        old = lines[item.line.number - 1]
        bom = b"\xef\xbb\xbf" if old.startswith(b"\xef\xbb\xbf") else b""
        text = old.removeprefix(bom).decode("utf-8")
        if text.removesuffix("\r") != item.line.text:
            raise DataError(f"{item.where}: was changed during the check; check again.")
        assert item.checked.duration_sec is not None  # of an item that is fixable
        lines[item.line.number - 1] = bom + _with_duration(text, item.checked.duration_sec)
    backup = _free_backup(manifest)
    with replacing(backup) as partial:
        shutil.copyfile(manifest, partial)
    with replacing(manifest) as partial:
        partial.write_bytes(b"\n".join(lines))
    return backup


def _with_duration(text: str, duration_sec: float) -> bytes:
    fields = json.loads(text)
    fields["duration"] = round(duration_sec, 6)  # a sample lasts longer than 1e-6 s
    end = text[len(text.rstrip()) :]
    try:
        return (json.dumps(fields, ensure_ascii=False) + end).encode("utf-8")
    except UnicodeEncodeError:  # names that are not UTF-8 stand there as escapes
        return (json.dumps(fields) + end).encode("utf-8")


def _free_backup(manifest: Path) -> Path:
    backup, number = manifest.with_name(f"{manifest.name}.bak"), 1
    while backup.exists():
        number += 1
        backup = manifest.with_name(f"{manifest.name}.bak-{number}")
    return backup
