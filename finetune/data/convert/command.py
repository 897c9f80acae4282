"""The command line of `python -m finetune.data.convert`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.commands import Parser
from finetune.data.convert.audiofolder import read_audiofolder
from finetune.data.convert.data_set import MANIFEST, Report, convert_all, open_folder
from finetune.data.convert.j_moshi import SIDES, read_j_moshi
from finetune.data.convert.lhotse import CutOptions, read_cuts
from finetune.data.convert.source import Source
from finetune.errors import DataError, printable

_NOT_SETTINGS = ("out",)


def convert(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python -m finetune.data.convert --help`.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status: 1 where a recording was left out.

    Raises:
        UserError: an option, the source or the folder cannot be used, or no recording of it.
    """
    options = _parser().parse_args(arguments)
    options.source, options.out = options.source.expanduser(), options.out.expanduser()
    if not options.source.exists():
        raise DataError(f"{options.source}: does not exist.")
    open_folder(options.out, _settings(options))
    report = convert_all(_read(options), options.out)
    _print(report, options)
    return 1 if report.faults else 0


def _read(options: argparse.Namespace) -> Source:
    if options.format == "j-moshi":
        return read_j_moshi(options.source, moshi=options.moshi)
    if options.format == "audiofolder":
        return read_audiofolder(options.source, text_column=options.text_column, times=options.times)
    cuts = CutOptions(
        options.alignment, options.moshi_channel, options.audio_root, estimate=options.times == "estimate"
    )
    return read_cuts(options.source, cuts)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides what is made, with absolute paths."""
    values = {key: value for key, value in vars(options).items() if key not in _NOT_SETTINGS}
    return {key: str(value.resolve()) if isinstance(value, Path) else value for key, value in values.items()}


def _print(report: Report, options: argparse.Namespace) -> None:
    for fault in report.faults:
        print(f"left out {printable(fault.where)}: {printable(fault.reason)}")
    total = report.converted + report.kept
    print(
        f"{printable(str(options.out / MANIFEST))}: {total} recordings, {report.hours:.2f} h; "
        f"{report.converted} converted, {report.kept} there before; {len(report.faults)} left out"
    )
    if report.num_outside:
        print(f"{report.num_outside} words lie outside their cuts and are left out.")
    if report.num_estimated:
        print(f"{report.num_estimated} recordings have estimated word times; annotate.py measures them.")
    if getattr(options, "times", "") == "annotate":
        print(f"No words yet: annotate.py {options.out / MANIFEST} --channels left finds their times.")
    if report.num_mono:
        print(f"{report.num_mono} recordings are mono: train with data.mono: user_silent (or duplicate).")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m finetune.data.convert",
        description="Make a data set of ours, wav files with word times and a manifest, from that of others. "
        "The same command goes on where it was stopped, and converts anew what has changed.",
        epilog="Exit status: 0 all recordings are in it, 1 some were left out, 2 nothing can be used.",
        allow_abbrev=False,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    j_moshi = formats.add_parser(
        "j-moshi",
        prog=f"{parser.prog} j-moshi",
        help="stereo files, and the words of A and B in .json files",
        allow_abbrev=False,
    )
    j_moshi.add_argument("source", type=Path, metavar="DIR", help="with audio/ and text/, or both in one")
    j_moshi.add_argument("--moshi", choices=SIDES, default="A", help="who becomes Moshi [%(default)s]")
    lhotse = formats.add_parser(
        "lhotse", prog=f"{parser.prog} lhotse", help="cuts.jsonl or cuts.jsonl.gz", allow_abbrev=False
    )
    lhotse.add_argument("source", type=Path, metavar="CUTS", help="the manifest of the cuts")
    lhotse.add_argument(
        "--alignment", default="word", metavar="NAME", help="which alignment holds the words [%(default)s]"
    )
    lhotse.add_argument(
        "--moshi-channel", type=int, metavar="N", help="which channel of two becomes Moshi [the first]"
    )
    lhotse.add_argument(
        "--audio-root",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where relative paths of audio files start [the present folder, as in lhotse]",
    )
    lhotse.add_argument(
        "--times",
        choices=("given", "estimate"),
        default="given",
        help="estimate: where words have no times, by their letters and the voice [%(default)s]",
    )
    folder = formats.add_parser(
        "audiofolder",
        prog=f"{parser.prog} audiofolder",
        help="Hugging Face: audio files of one voice and metadata.csv or .jsonl",
        allow_abbrev=False,
    )
    folder.add_argument("source", type=Path, metavar="DIR", help="with the metadata")
    folder.add_argument("--text-column", default="text", metavar="NAME", help="what is said [%(default)s]")
    folder.add_argument(
        "--times",
        choices=("estimate", "annotate"),
        default="estimate",
        help="of the words: estimated by their letters and the voice, or left to annotate.py [%(default)s]",
    )
    for part in (j_moshi, lhotse, folder):
        part.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data set to make")
    return parser
