"""Train the arms, or what is left of them, and write the report.

    python -m experiments.recall pattern --out runs/recall
    python -m experiments.recall speech --out runs/recall
    python -m experiments.recall speech-long --out runs/recall
    python -m experiments.recall init --out runs/recall
    python -m experiments.recall ablation --out runs/recall
    python -m experiments.recall gate --out runs/recall

Every run is a file in the folder: what is there is not trained again, and Ctrl-C loses the run in progress
only. Several processes may share the work: `--seeds 1` here and `--seeds 2 3` there.
"""

import argparse
import logging
import math
from pathlib import Path

import torch

from experiments.options import check_only
from experiments.recall.report import write_report
from experiments.recall.runs import run_arm
from experiments.recall.studies import EXPERIMENTS, plans_of
from experiments.recall.training import Schedule
from finetune.commands import Parser, run_command
from finetune.inference.options import positive_integer

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one experiment."""
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    experiment = EXPERIMENTS[options.experiment]
    plans = plans_of(options.experiment, demo=options.demo)
    check_only(options.only, [plan.label for plan in plans])
    if options.only:
        plans = [plan for plan in plans if plan.label in options.only]
    schedule = Schedule(
        num_steps=options.steps or experiment.num_steps,
        batch_size=options.batch_size,
        budget_min=options.budget_min,
    )
    folder = options.out / options.experiment
    for seed in options.seeds:
        for plan in plans:
            run = run_arm(folder, plan, schedule, seed=seed)
            logger.info("%s seed %d: loss %.4f, %s", plan.label, seed, run.loss, run.problem or "finished")
    for path in write_report(folder, options.experiment):
        logger.info("%s", path)
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.recall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of the results")
    parser.add_argument(
        "--seeds", type=positive_integer, nargs="+", default=[1, 2, 3], help="of weights and sequences"
    )
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="runs to make instead of all")
    parser.add_argument("--steps", type=positive_integer, help="optimiser steps instead of the experiment's")
    parser.add_argument(
        "--batch-size", type=positive_integer, default=16, help="sequences per step (%(default)s)"
    )
    parser.add_argument(
        "--budget-min",
        type=_minutes,
        default=60.0,
        help="minutes after which a run stops where it is, and says so (%(default)s)",
    )
    parser.add_argument("--threads", type=positive_integer, default=1, help="of the CPU (%(default)s)")
    parser.add_argument(
        "--demo",
        type=Path,
        default=Path("runs/recall/dialogues"),
        help="recordings of `speech`, made by python -m finetune.demo (%(default)s)",
    )
    return parser.parse_args()


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, must be minutes above 0")
    return value


if __name__ == "__main__":
    run_command(main)
