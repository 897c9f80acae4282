"""The command line of `python -m finetune.data.manifest`: from a folder of recordings to a manifest."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from finetune.commands import Parser, run_command
from finetune.data.audio.find import find_audio_files, no_audio_files, printable
from finetune.data.recordings.lengths import measure_all
from finetune.errors import ConfigError, DataError
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.state_file import check_writable


def write_manifest(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python -m finetune.data.manifest --help`.

    Returns:
        The exit status: 1 where a file was left out.

    Raises:
        UserError: an option or the folder cannot be used, or no file of it.
        StateError: the manifest cannot be written.
    """
    options = _parser().parse_args(arguments)
    folder = options.folder.expanduser()
    out = folder / "manifest.jsonl" if options.out is None else options.out.expanduser()
    _check(options, folder, out)
    files = find_audio_files(folder)
    if not files:
        raise no_audio_files(folder)
    measured = measure_all(files, num_jobs=options.jobs, need_words=options.text != "none")
    used = [(file.path, file.duration_sec) for file in measured if file.duration_sec is not None]
    left_out = [(file.path, file.reason) for file in measured if file.reason is not None]
    for path, reason in left_out:
        print(f"left out {printable(str(path))}: {printable(reason)}")
    if not used:
        raise DataError(f"{folder}: none of {len(files)} audio files can be used; nothing was written.")
    lines = [
        json.dumps(
            {"path": _relative(path, out.parent), "duration": round(duration_sec, 6)} | _speaker_of(path)
        )
        for path, duration_sec in used
    ]
    with replacing(out) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    hours = sum(duration_sec for _, duration_sec in used) / 3600
    print(f"{printable(str(out))}: {len(used)} recordings, {hours:.2f} h; {len(left_out)} left out")
    return 1 if left_out else 0


def _speaker_of(path: Path) -> dict[str, str]:
    """The speaker that the file beside a recording names, as LibriLight's do."""
    try:
        speaker = json.loads(path.with_suffix(".json").read_text(encoding="utf-8-sig"))["speaker"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {"speaker": str(speaker)} if isinstance(speaker, str | int) and str(speaker) else {}


def _relative(path: Path, folder: Path) -> str:
    """The path of a file from a manifest's folder; links on the way are kept where possible."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if path.is_relative_to(folder):
        return path.relative_to(folder).as_posix()
    # `..` leads out of where a link points to, not out of where it lies.
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(folder))


def _check(options: argparse.Namespace, folder: Path, out: Path) -> None:
    if options.jobs < 1:
        raise ConfigError(f"--jobs: {options.jobs} is less than 1.")
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {problem}; name a folder of recordings.")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out: {out} must end in .jsonl, as manifests do.")
    if os.path.lexists(out) and not options.overwrite:
        raise ConfigError(f"{out}: exists; --overwrite replaces it, --out writes another file.")
    check_writable(out)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m finetune.data.manifest",
        description="Write a manifest of the audio files below a folder that have word timings beside them.",
        epilog="Exit status: 0 all files are in it, 1 some were left out, 2 nothing was written.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the recordings, at any depth")
    parser.add_argument(
        "--text",
        choices=("given", "none"),
        default="given",
        help="none: for a training with data.text: none, which needs no word timings [%(default)s]",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the manifest [DIR/manifest.jsonl]")
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes [%(default)s]")
    return parser


if __name__ == "__main__":
    run_command(write_manifest)
