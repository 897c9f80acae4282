"""Command line: `python -m finetune.demo.recall [--num-items 1000]`."""

import argparse
import logging
from functools import partial
from pathlib import Path

from finetune.commands import Parser
from finetune.demo.made_folder import MAX_SEED
from finetune.demo.recall.assets import (
    MAX_DIALOGUES,
    MAX_ITEMS,
    MIN_DIALOGUES,
    MIN_ITEMS,
    make_recall_assets,
)
from finetune.distributed import ConsoleHandler
from finetune.inference.options import whole_number
from finetune.inference.terminal import say


def demo_recall(arguments: list[str] | None = None) -> None:
    """Make items, dialogues and an untrained model, and say what to do with them.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Raises:
        UserError: the user has to mend something.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parse(arguments)
    assets = make_recall_assets(
        options.out, num_items=options.num_items, num_train=options.num_train, seed=options.seed
    )
    say(f"{'reused' if assets.reused else 'made'} {assets.folder}")
    for name, hours in assets.hours.items():
        say(f"{assets.manifest(name)}: {hours:.2f} h")
    say(f"{assets.items_dir}: for evaluate.py recall --data")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m finetune.demo.recall",
        description="Makes conversations in which a name, number, place or wish is said once and needed "
        "later: items for evaluate.py recall, and dialogues with other plants to train a tiny Moshi on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/recall/assets"), help="folder of everything (%(default)s)"
    )
    parser.add_argument(
        "--num-items",
        type=partial(whole_number, lowest=MIN_ITEMS, highest=MAX_ITEMS),
        default=1000,
        help="to measure with (%(default)s)",
    )
    parser.add_argument(
        "--num-train",
        type=partial(whole_number, lowest=MIN_DIALOGUES, highest=MAX_DIALOGUES),
        default=2000,
        help="dialogues to train on (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=partial(whole_number, lowest=0, highest=MAX_SEED),
        default=1,
        help="of items, dialogues and weights (%(default)s)",
    )
    return parser.parse_args(arguments)
