"""How long recordings are, found out in processes of which one may die."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def measure_all(files: Sequence[Path], *, num_jobs: int) -> list[MeasuredFile]:
    """Find out how long recordings are, in processes of which one may die.

    Args:
        files: audio files, or what is called so.
        num_jobs: processes.

    Returns:
        In the order of `files`.
    """
    measured: dict[Path, MeasuredFile] = {}
    outcomes = run_tasks(
        prepare_length_worker, files, num_workers=num_jobs, isolated=True, time_limit_sec=limit_sec
    )
    for outcome in outcomes:
        measured[outcome.task] = outcome.result or MeasuredFile(outcome.task, None, outcome.failure)
    return [measured[file] for file in files]


def prepare_length_worker(_number: int) -> Callable[[Path], MeasuredFile]:
    """What a process does with its files; called in it."""
    silence_stderr()
    return measure_file


def measure_file(path: Path) -> MeasuredFile:
    """Find out how long a recording is: wav and flac say so in their headers, others are decoded."""
    finding = find_file(path) or find_file(
        path.with_suffix(".json"), missing="no-timings", no_file="no-timings"
    )
    if finding is not None:
        what = "has no word timings: " if finding.code == "no-timings" else ""
        return MeasuredFile(path, None, f"{what}{finding.path.name if what else 'it'} {finding.reason}")
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
