"""The command line of annotate.py: word timings beside every recording of a folder or manifest."""

import argparse
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.annotation.aligner import LOCAL_WORDS, MIN_LOCAL_SCORE, MIN_SCORE
from finetune.annotation.annotate_file import annotate_file, is_annotated
from finetune.annotation.engines import ENGINES, EngineSettings
from finetune.annotation.recordings import CHANNELS, AudioRecording, find_recordings, take_shard
from finetune.commands import Parser
from finetune.data.check.findings import reason_of
from finetune.data.processes import run_tasks
from finetune.distributed import ConsoleHandler
from finetune.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What became of the recordings of a job; `rejected` has the reason for each."""

    annotated: list[Path]
    skipped: list[Path]
    rejected: list[tuple[Path, str]]

    def __str__(self) -> str:
        total = len(self.annotated) + len(self.skipped) + len(self.rejected)
        lines = [
            f"{total} recordings: {len(self.annotated)} annotated, {len(self.skipped)} skipped (annotated "
            f"before), {len(self.rejected)} rejected"
        ]
        return "\n".join(lines + [f"rejected {path}: {reason}" for path, reason in self.rejected])


def annotate(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python annotate.py --help`.

    Returns:
        The exit status: 1 where a recording was rejected.

    Raises:
        UserError: an option or the source cannot be used, or the engine's package is missing.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    _check(options)
    recordings = find_recordings(options.source)
    if options.shard is not None:
        recordings = take_shard(recordings, options.shard)
    settings = EngineSettings(
        options.engine,
        whisper_model=options.whisper_model,
        language=None if options.language == "auto" else options.language,
        device=options.device,
        min_score=options.min_score,
        min_local_score=options.min_local_score,
    )
    channels = CHANNELS if options.channels == "both" else (options.channels,)
    report = annotate_all(
        recordings, settings, channels=channels, num_workers=options.workers, overwrite=options.overwrite
    )
    print(report)
    return 1 if report.rejected else 0


def annotate_all(
    recordings: Sequence[AudioRecording],
    settings: EngineSettings,
    *,
    channels: Sequence[str] = CHANNELS,
    num_workers: int = 1,
    overwrite: bool = False,
) -> Report:
    """Annotate recordings that are not yet, in several processes.

    Args:
        recordings: what to annotate.
        settings: of the engine.
        channels: those to annotate, `left` and `right`.
        num_workers: processes.
        overwrite: annotate those that have word timings, too.

    Raises:
        UserError: the engine's package is missing.
    """
    report = Report([], [], [])
    todo: list[AudioRecording] = []
    for recording in recordings:
        try:
            done = not overwrite and is_annotated(recording)
        except DataError as error:
            _reject(report, recording, str(error))
            continue
        if done:
            report.skipped.append(recording.path)
        else:
            todo.append(recording)
    logger.info("%d recordings to annotate, %d annotated before.", len(todo), len(report.skipped))
    prepare = partial(_prepare, settings, tuple(channels))
    for number, outcome in enumerate(run_tasks(prepare, todo, num_workers=num_workers) if todo else (), 1):
        failure = outcome.failure or outcome.result
        if failure is None:
            report.annotated.append(outcome.task.path)
            logger.info("%d/%d annotated %s", number, len(todo), outcome.task.path)
        else:
            _reject(report, outcome.task, failure)
    return report


def _reject(report: Report, recording: AudioRecording, reason: str) -> None:
    reason = reason_of(recording.path, reason)
    report.rejected.append((recording.path, reason))
    logger.warning("rejected %s: %s", recording.path, reason)


def _prepare(
    settings: EngineSettings, channels: tuple[str, ...], worker: int
) -> Callable[[AudioRecording], str | None]:
    engine = settings.build(worker)

    def work(recording: AudioRecording) -> str | None:
        try:
            annotate_file(recording, engine, channels=channels)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or recording.path}: {error.strerror}."
        return None

    return work


def _check(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise ConfigError(f"--workers: {options.workers} is less than 1.")
    for option in ("min_score", "min_local_score"):
        if math.isnan(getattr(options, option)):
            raise ConfigError(f"--{option.replace('_', '-')}: nan is not a score.")


def _parser() -> Parser:
    parser = Parser(
        prog="annotate.py",
        description="Write the times of the words beside stereo recordings, Moshi left and the user right.",
        epilog="Exit status: 0 all annotated, 1 some rejected, 2 nothing could be done.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a folder of recordings or a manifest (.jsonl)"
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="whisper",
        help="whisper transcribes, on a GPU; pocketsphinx aligns given English transcripts, on a CPU "
        "[%(default)s]",
    )
    parser.add_argument("--channels", choices=("both", *CHANNELS), default="both", help="[%(default)s]")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes [%(default)s]")
    parser.add_argument("--shard", metavar="I/N", help="annotate the I-th of N shares, I from 1 to N")
    parser.add_argument("--overwrite", action="store_true", help="replace word timings that are there")
    group = parser.add_argument_group("whisper")
    group.add_argument("--whisper-model", default="medium", metavar="NAME", help="[%(default)s]")
    group.add_argument("--language", default="en", metavar="CODE", help="or auto, per channel [%(default)s]")
    group.add_argument("--device", default="cuda", help="cuda spreads workers over GPUs [%(default)s]")
    group = parser.add_argument_group("pocketsphinx")
    group.add_argument(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        metavar="X",
        help="of a channel, per frame [%(default)s]",
    )
    group.add_argument(
        "--min-local-score",
        type=float,
        default=MIN_LOCAL_SCORE,
        metavar="X",
        help=f"of {LOCAL_WORDS} words in a row [%(default)s]",
    )
    return parser
