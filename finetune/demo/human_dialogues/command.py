"""Dialogues of human actors: `python -m finetune.demo.human_dialogues fillets-cs --out fillets_cs`.

Games that Debian packages have hours of acted dialogue. Their packages are fetched, and each conversation
becomes a stereo recording: Moshi on the left, the other on the right, in the order of the script.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from finetune.annotation.aligner import Aligner
from finetune.commands import Parser
from finetune.demo.debian.fetch import fetch_packages
from finetune.demo.human_dialogues.material import Material
from finetune.demo.human_dialogues.recordings import Settings, Total, write_recordings
from finetune.demo.human_dialogues.sources import SOURCES
from finetune.distributed import ConsoleHandler
from finetune.errors import UserError
from finetune.evaluation.out_folder import make_folder
from finetune.files import read_json_object, write_json, writing_to


def human_dialogues(arguments: Sequence[str] | None = None) -> int:
    """Make the dialogues and print what there is.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the user has to mend something.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parse(arguments)
    source = SOURCES[options.source]
    out_dir = options.out.absolute()
    make_folder(out_dir)
    packages = fetch_packages(options.packages or out_dir / "packages", source.packages)
    _check_settings(out_dir / "settings.json", options, packages)
    material = source.read(packages)
    for name, text in material.notices.items():
        with writing_to(out_dir / name):
            (out_dir / name).write_text(text, encoding="utf-8")
    settings = Settings(not options.swap, options.seed, options.held_out)
    aligner = Aligner() if material.english else None
    totals = write_recordings(out_dir / "data", material.conversations, settings, aligner)
    _print(out_dir, packages, material, settings, totals)
    return 0


def _check_settings(path: Path, options: argparse.Namespace, packages: Sequence[Path]) -> None:
    """See that what the folder holds is of the same settings, and note them.

    Raises:
        UserError: it is not.
    """
    settings = {
        "source": options.source,
        "packages": [package.name for package in packages],
        "seed": options.seed,
        "held_out": options.held_out,
        "swap": options.swap,
    }
    if not path.exists():
        with writing_to(path):
            write_json(path, settings)
        return
    before = read_json_object(path, error=UserError)
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"{path.parent}: was made with {key} {before.get(key)}, not {value}; choose another --out."
            )


def _print(
    out_dir: Path, packages: Sequence[Path], material: Material, settings: Settings, totals: dict[str, Total]
) -> None:
    for path in packages:
        print(f"package:    {path.name}, {path.stat().st_size / 1e6:.1f} MB")
    for reason, count in material.left_out.items():
        print(f"left out:   {count} recordings {reason}")
    lines_left_out = sum(total.lines_left_out for total in totals.values())
    if lines_left_out:
        print(f"left out:   {lines_left_out} recordings that cannot be used")
    names = material.speakers if settings.first_is_moshi else material.speakers[::-1]
    for side, (channel, name) in enumerate(zip(("left", "right"), names, strict=True)):
        minutes = sum(total.voice_sec[side] for total in totals.values()) / 60
        print(f"{channel + ':':11} {name}, {minutes:.1f} minutes of words")
    words = sum(total.words for total in totals.values())
    estimated = sum(total.estimated for total in totals.values())
    print(f"words:      {words:,}, of which the times of {estimated:,} are estimated")
    for split, total in totals.items():
        manifest = out_dir / "data" / f"{split}.jsonl"
        print(f"{split + ':':11} {manifest}, {total.recordings} dialogues, {total.seconds / 60:.1f} minutes")
    print(f"terms:      {', '.join(str(out_dir / name) for name in material.notices)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    sources = "; ".join(f"{name}: {source.help}" for name, source in SOURCES.items())
    parser = Parser(
        prog="python -m finetune.demo.human_dialogues",
        description="Makes stereo dialogues with word times from the voices of games that Debian packages.",
        epilog=f"{sources}. What is there already is kept, so the same line goes on after an interruption.",
        allow_abbrev=False,
    )
    parser.add_argument("source", choices=SOURCES, help="what to fetch: %(choices)s", metavar="SOURCE")
    parser.add_argument("--out", type=Path, required=True, help="directory to fill")
    parser.add_argument(
        "--packages", type=Path, help="where the .deb files are, or are put (packages/ in the directory)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="share of the dialogues to evaluate on (%(default)s)"
    )
    parser.add_argument(
        "--swap", action="store_true", help="the other speaker becomes Moshi and is on the left"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same files (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if not 0 < options.held_out < 1:
        raise UserError(f"--held-out is {options.held_out}, it must be between 0 and 1.")
    return options
