"""The check of all recordings of a manifest, in processes of which one may die."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from finetune.data.audio.read import limit_sec, silence_stderr
from finetune.data.check.findings import SEVERITIES, Finding
from finetune.data.check.full import CheckedRecording, Checker, Settings
from finetune.data.processes import TaskOutcome, run_tasks
from finetune.data.recordings.lines import ManifestEntry, ManifestLine, Recording, read_lines
from finetune.data.recordings.recording import noted_before
from finetune.data.text_report import refuse_wordless
from finetune.errors import DataError, one_line

Follow = Callable[[Iterator[TaskOutcome]], Iterable[TaskOutcome]]


@dataclass(frozen=True)
class CheckedLine:
    """A line of the manifest and what is known of its recording.

    Attributes:
        line: as it stands in the manifest.
        recording: what it names, with a duration of NaN where the line has none; None where it names nothing
            or something that another line names.
        checked: the outcome; of lines that are not checked, the findings about the line.
    """

    line: ManifestLine
    recording: Recording | None
    checked: CheckedRecording

    @property
    def where(self) -> str:
        """Manifest and number of the line."""
        return _where(self.line)

    @property
    def findings(self) -> list[Finding]:
        """All findings, with the line."""
        return [replace(finding, line=self.where) for finding in self.checked.findings]


def check_data_set(
    manifest: Path, settings: Settings, *, num_jobs: int, follow: Follow = iter
) -> list[CheckedLine]:
    """Read every file of a manifest.

    Args:
        manifest: a `.jsonl` file, or a folder of them, as `data.train_data`.
        settings: of the check.
        num_jobs: processes.
        follow: wraps what yields an outcome per recording, for a progress bar.

    Returns:
        The lines in their order.

    Raises:
        DataError: the manifest cannot be read at all or lists nothing.
    """
    items = list(_read(manifest))
    if not items:
        raise DataError(
            f'{manifest}: lists no recordings; add lines like {{"path": "a.wav", "duration": 12.5}}.'
        )
    tasks = [(index, item.recording) for index, item in enumerate(items) if item.recording is not None]
    prepare = partial(prepare_check_worker, settings)
    outcomes = run_tasks(prepare, tasks, num_workers=num_jobs, isolated=True, time_limit_sec=_limit_sec)
    for outcome in follow(outcomes):
        index, recording = outcome.task
        checked = outcome.result
        if outcome.failure is not None:
            checked = CheckedRecording([Finding("check-failed", recording.path, outcome.failure)])
        about_line = items[index].checked.findings
        checked = replace(checked, findings=about_line + checked.findings)
        items[index] = replace(items[index], checked=checked)
    return _find_wordless(_find_same_audio(items), settings, manifest)


def sorted_findings(items: Iterable[CheckedLine]) -> list[Finding]:
    """All findings, errors first, then in the manifest's order."""
    findings = [finding for item in items for finding in item.findings]
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def prepare_check_worker(
    settings: Settings, _number: int
) -> Callable[[tuple[int, Recording]], CheckedRecording]:
    """What a process does with its recordings; called in it.

    Raises:
        DataError: the tokenizer cannot be read.
    """
    checker = Checker(settings)
    silence_stderr()

    def work(task: tuple[int, Recording]) -> CheckedRecording:
        recording = task[1]
        try:
            return checker.check(recording)
        except Exception as error:  # whatever a file brings about, the others are to be checked
            reason = one_line(f"{type(error).__name__}: {error}")
            return CheckedRecording([Finding("check-failed", recording.path, reason)])

    return work


def _limit_sec(task: tuple[int, Recording]) -> float:
    return limit_sec(task[1].path)


def _read(manifest: Path) -> Iterator[CheckedLine]:
    """The lines with what is wrong with them as lines."""
    first_seen: dict[str, str] = {}
    timings: dict[str, Path] = {}
    for line in read_lines(manifest, key="MANIFEST"):
        findings = []
        if line.fault is not None:
            code = "manifest-line" if line.entry is None else "manifest-duration"
            path = line.manifest if line.entry is None else line.entry.path
            findings.append(Finding(code, path, line.fault))
        if line.entry is None:
            yield CheckedLine(line, None, CheckedRecording(findings))
            continue
        recording = _recording(line.entry)
        first = noted_before(first_seen, recording.path, _where(line))
        if first is not None:
            reason = f"is already listed ({first})"
            findings.append(Finding("listed-twice", recording.path, reason))
            yield CheckedLine(line, None, CheckedRecording(findings))
            continue
        other = noted_before(timings, recording.alignment_path, recording.path)
        if other is not None:
            reason = f"has its word timings in the same file as {other}"
            findings.append(Finding("shared-timings", recording.path, reason))
        yield CheckedLine(line, recording, CheckedRecording(findings))


def _recording(entry: ManifestEntry) -> Recording:
    path = entry.path
    duration_sec = float("nan") if entry.duration_sec is None else entry.duration_sec
    alignment_path = path.with_suffix(".json") if path.name else path
    return Recording(path, duration_sec, alignment_path)


def _find_same_audio(items: list[CheckedLine]) -> list[CheckedLine]:
    first_seen: dict[str, Path] = {}
    compared = []
    for item in items:
        recording, digest = item.recording, item.checked.digest
        if recording is not None and digest is not None:
            other = first_seen.setdefault(digest, recording.path)
            if other != recording.path:
                finding = Finding("same-audio", recording.path, f"is byte for byte the same as {other}")
                findings = [*item.checked.findings, finding]
                item = replace(item, checked=replace(item.checked, findings=findings))
        compared.append(item)
    return compared


def _find_wordless(items: list[CheckedLine], settings: Settings, manifest: Path) -> list[CheckedLine]:
    """A data set without any word to train on; what is said of it stands with its first line."""
    num_words = [item.checked.num_words for item in items if item.checked.num_words is not None]
    try:
        refuse_wordless(num_words, settings.text, key="no-words")
    except DataError as error:
        reason = str(error).removeprefix("no-words: ").partition(",")[0]
        finding = Finding("no-words", manifest, reason)
        checked = replace(items[0].checked, findings=[*items[0].checked.findings, finding])
        return [replace(items[0], checked=checked), *items[1:]]
    return items


def _where(line: ManifestLine) -> str:
    return f"{line.manifest} line {line.number}"
