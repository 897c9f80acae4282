"""Train a tiny Moshi with TTT and without on dialogues of plants, and measure what it recalls by lag.

    python -m experiments.planted --out runs/planted

For each seed: items and dialogues (`finetune.demo.recall`), the base (`example/recall_base.yaml`), the
fine-tuning with TTT on short dialogues (`example/recall_short.yaml`), then on longer ones, where a model
without TTT is trained too (`example/recall.yaml`), and `evaluate.py recall` with the memory on, frozen,
off and across sessions. What is there is not made again; report and picture are of all seeds in the folder.
"""

import argparse
from functools import partial
from pathlib import Path

from experiments.options import steps_parser
from experiments.planted.report import write_report
from experiments.planted.runs import Sizes, run_seed
from finetune.commands import run_command
from finetune.demo.recall.assets import MAX_DIALOGUES, MAX_ITEMS, MIN_DIALOGUES, MIN_ITEMS
from finetune.inference.options import positive_integer, whole_number
from finetune.inference.terminal import say


def main() -> int:
    """Run all seeds; the exit status is that of the first step that did not end well."""
    options = _parse()
    sizes = Sizes(
        options.num_items, options.num_train, options.base_steps, options.short_steps, options.steps
    )
    for seed in options.seeds:
        if status := run_seed(options.out / f"seed{seed}", sizes, seed=seed, lags=options.lags):
            return status
    for path in write_report(options.out):
        say(f"written: {path}")
    return 0


def _parse() -> argparse.Namespace:
    parser = steps_parser("experiments.planted", __doc__, out=Path("runs/planted"))
    items = partial(whole_number, lowest=MIN_ITEMS, highest=MAX_ITEMS)
    dialogues = partial(whole_number, lowest=MIN_DIALOGUES, highest=MAX_DIALOGUES)
    parser.add_argument("--num-items", type=items, default=400, help="to measure with (%(default)s)")
    parser.add_argument("--num-train", type=dialogues, default=2000, help="dialogues (%(default)s)")
    parser.add_argument("--short-steps", type=positive_integer, help="of those on short dialogues")
    parser.add_argument(
        "--lags",
        default="30f,60f,125f,250f,500f,1000f,2000f",
        help="as those of evaluate.py recall (%(default)s)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
