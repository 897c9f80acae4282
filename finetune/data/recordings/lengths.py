"""How long recordings are, found out in processes of which one may die."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.data.audio.read import audio_kind, limit_sec, read_audio_header, read_pieces, silence_stderr
from finetune.data.check.fast import find_file
from finetune.data.check.findings import reason_of
from finetune.data.processes import run_tasks
from finetune.errors import DataError


@dataclass(frozen=True)
class MeasuredFile:
    """A file of the folder: its length in seconds, or why it is left out."""

    path: Path
    duration_sec: float | None
    reason: str | None


def measure_all(files: Sequence[Path], *, num_jobs: int, need_words: bool = True) -> list[MeasuredFile]:
    """Find out how long recordings are, in processes of which one may die.

    Args:
        files: audio files, or what is called so.
        num_jobs: processes.
        need_words: leave out files without word timings beside them.

    Returns:
        In the order of `files`.
    """
    measured: dict[Path, MeasuredFile] = {}
    outcomes = run_tasks(
        partial(prepare_length_worker, need_words),
        files,
        num_workers=num_jobs,
        isolated=True,
        time_limit_sec=limit_sec,
    )
    for outcome in outcomes:
        measured[outcome.task] = outcome.result or MeasuredFile(outcome.task, None, outcome.failure)
    return [measured[file] for file in files]


def prepare_length_worker(need_words: bool, _number: int) -> Callable[[Path], MeasuredFile]:
    """What a process does with its files; called in it."""
    silence_stderr()
    return partial(measure_file, need_words=need_words)


def measure_file(path: Path, *, need_words: bool = True) -> MeasuredFile:
    """Find out how long a recording is: wav and flac say so in their headers, others are decoded.

    Args:
        path: of the audio.
        need_words: there must be word timings beside it.
    """
    finding = find_file(path)
    if finding is not None:
        return MeasuredFile(path, None, f"it {finding.reason}")
    reason = _why_wordless(path.with_suffix(".json")) if need_words else None
    if reason is not None:
        return MeasuredFile(path, None, f"has no word timings: {reason}")
    try:
        header = read_audio_header(path)
        num_samples = header.num_samples
        if audio_kind(path) not in ("wav", "flac"):
            pieces = read_pieces(path, sample_rate=header.sample_rate)
            num_samples = sum(piece.shape[1] for piece in pieces)
        if num_samples == 0:
            raise DataError("holds no samples.")
    except (DataError, OSError) as error:
        return MeasuredFile(path, None, reason_of(path, error))
    return MeasuredFile(path, num_samples / header.sample_rate, None)


def _why_wordless(path: Path) -> str | None:
    """Why the file beside a recording has no word timings, None where it may have some."""
    finding = find_file(path, missing="no-timings", no_file="no-timings")
    if finding is not None:
        return f"{path.name} {finding.reason}"
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None  # the check says what is wrong
    if isinstance(content, dict) and content and "alignments" not in content:
        return f'{path.name} has no "alignments"; annotate it, or use --text none'
    return None
