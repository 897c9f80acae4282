"""Options of `evaluate.py recall`."""

import argparse
from typing import Final, get_args

from moshi.models.loaders import FRAME_RATE

from finetune.errors import ConfigError
from finetune.evaluation.options import add_bootstrap, add_cache_dir, add_max_failures
from finetune.evaluation.recall.measure import SESSIONS
from finetune.inference.options import add_model_options, choose_checkpoint, positive_integer, whole_number
from moshi_ttt.hybrid_model import TTTMode

ARMS: Final = (*get_args(TTTMode), SESSIONS)
_CHUNK_FRAMES = 256  # 20 s, whole mini-batches
_LONGEST_LAG = 10_000_000  # frames


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the model, the items, the measurement and the intervals."""
    add_model_options(parser)
    group = parser.add_argument_group("items")
    group.add_argument(
        "--data", required=True, metavar="DIR", help="folder with recall.jsonl, see docs/recall.md"
    )
    group.add_argument(
        "--lags",
        type=_lags,
        default="10,60",
        metavar="LIST",
        help="from the end of what is said once to where it is needed, seconds (10,60) or frames (125f)",
    )
    group.add_argument(
        "--limit",
        type=positive_integer,
        metavar="N",
        help="so many items, drawn once, the same in every run (all)",
    )
    add_cache_dir(group)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        metavar="ARM",
        help=f"what the memory does: {', '.join(ARMS)} (all of them; a model without TTT has none)",
    )
    group.add_argument(
        "--compare", metavar="PATH", help="a second checkpoint, on the same items; its first arm is compared"
    )
    group.add_argument(
        "--batch-size",
        type=positive_integer,
        default=4,
        metavar="N",
        help="items that are streamed together; changes time and memory, not the scores (%(default)s)",
    )
    group.add_argument(
        "--chunk-frames",
        type=positive_integer,
        default=_CHUNK_FRAMES,
        help="frames per forward pass; changes time and memory, not the scores (%(default)s)",
    )
    add_max_failures(group, units="items")
    group = parser.add_argument_group("intervals")
    add_bootstrap(group, units="items", seeds="the draws and of the order of the filler")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of the results; one that holds an unfinished measurement is gone on with "
        "(evaluation/recall/… in the run directory)",
    )


def check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ConfigError: names them.
    """
    choose_checkpoint(options)
    if options.ttt != "on":
        raise ConfigError(
            f"--ttt {options.ttt}: what the memory does is chosen with --arms; leave --ttt out."
        )
    if options.arms is not None and len(set(options.arms)) < len(options.arms):
        raise ConfigError(f"--arms: {' '.join(options.arms)} names one twice.")


def _lags(text: str) -> list[int]:
    """Lags in frames, in rising order."""
    lags = {_lag(part.strip()) for part in text.split(",")}
    return sorted(lags)


def _lag(text: str) -> int:
    if text.endswith("f"):
        return whole_number(text[:-1], lowest=1, highest=_LONGEST_LAG)
    try:
        frames = round(float(text) * FRAME_RATE)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither seconds nor frames such as 125f") from None
    if not 1 <= frames <= _LONGEST_LAG:
        raise argparse.ArgumentTypeError(f"{text} s are {frames} frames, not 1 to {_LONGEST_LAG:,}")
    return frames
