"""Train the arms, or what is left of them, and write the report.

    python -m experiments.recall pattern --out runs/recall
    python -m experiments.recall speech --out runs/recall
    python -m experiments.recall init --out runs/recall

Every run is a file in the folder: what is there is not trained again, and Ctrl-C loses the run in progress
only. Several processes may share the work: `--seeds 0` here and `--seeds 1 2` there.
"""

import argparse
import logging
from pathlib import Path

import torch

from experiments.recall.runs import run_arm
from experiments.recall.studies import arms, initialisations
from experiments.recall.tasks import PatternTask
from experiments.recall.training import Schedule
from finetune.cli import Parser, run_command
from finetune.inference.options import positive_integer

EXPERIMENTS = {"pattern": lambda: arms(PatternTask()), "init": initialisations}


def main() -> int:
    """Run one experiment."""
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    plans = [p for p in EXPERIMENTS[options.experiment]() if not options.only or p.label in options.only]
    for seed in options.seeds:
        for plan in plans:
            schedule = Schedule(num_steps=options.steps, lr=plan.lr, budget_min=options.budget_min)
            run = run_arm(options.out, plan.label, plan.arm, plan.task, plan.settings, schedule, seed=seed)
            print(f"{plan.label} seed {seed}: loss {run.losses[-1]:.4f} after {run.steps[-1]} steps")
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and sequences")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="runs to make")
    parser.add_argument("--steps", type=positive_integer, default=2400, help="optimiser steps (%(default)s)")
    parser.add_argument("--budget-min", type=float, help="minutes after which a run stops where it is")
    parser.add_argument("--threads", type=positive_integer, default=1, help="of the CPU (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
