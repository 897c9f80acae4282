"""Train a small Moshi on dialogues of human actors, with TTT and without, and measure what its memory adds.

    python -m experiments.human_speech --out runs/human_speech

Dialogues in Czech, Dutch and English of games that Debian packages (`finetune.demo.human_dialogues`, which
says under which terms), each also with its speakers exchanged; the base (`example/human_speech_base.yaml`);
for each seed the fine-tuning with TTT and without (`example/human_speech.yaml`); and on the held-out
dialogues `evaluate.py long-context` and `evaluate.py recall`. What is there is not made again.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from experiments.human_speech.report import write_report
from experiments.human_speech.runs import Settings, fine_tune, make_base, recall
from experiments.options import steps_parser
from finetune.commands import run_command
from finetune.demo.human_dialogues.sources import SOURCES
from finetune.inference.options import whole_number
from finetune.inference.terminal import say

_MAX_GROUPS = 10_000


def main() -> int:
    """Run everything; the exit status is that of the first step that did not end well."""
    options = _parse()
    started = time.monotonic()
    settings = Settings(options.sources, options.packages, options.groups, options.base_steps, options.steps)
    if status := make_base(options.out, settings):
        return status
    for seed in options.seeds:
        if status := fine_tune(options.out, settings, seed=seed):
            return status
    for seed in options.seeds:
        if status := recall(options.out, seed=seed):
            return status
    say(f"written: {write_report(options.out)} ({(time.monotonic() - started) / 60:.0f} minutes)")
    return 0


def _parse() -> argparse.Namespace:
    parser = steps_parser("experiments.human_speech", __doc__, out=Path("runs/human_speech"))
    parser.add_argument("--sources", choices=SOURCES, nargs="+", default=list(SOURCES), metavar="SOURCE")
    parser.add_argument(
        "--packages", type=Path, help="where the .deb files are, or are put (beside the dialogues)"
    )
    groups = partial(whole_number, lowest=1, highest=_MAX_GROUPS)
    parser.add_argument("--groups", type=groups, default=40, help="of items by kind and source (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
