"""Fine-tune a trained base in several ways, or what is left of them, and write the report.

    python -m experiments.fine_tuning recall --out runs/fine_tuning
    python -m experiments.fine_tuning retention --out runs/fine_tuning
    python -m experiments.fine_tuning capacity --out runs/fine_tuning
    python -m experiments.fine_tuning pairs --out runs/fine_tuning
    python -m experiments.fine_tuning learning --out runs/fine_tuning
    python -m experiments.fine_tuning mini-batch --out runs/fine_tuning
    python -m experiments.fine_tuning head-width --out runs/fine_tuning

Every run is a file in the folder: what is there is not computed again, and Ctrl-C loses the run in progress
only. Several processes may share the work: `--seeds 1` here and `--seeds 2 3` there.
"""

import argparse
import logging
from pathlib import Path

import torch

from experiments.fine_tuning.report import write_report
from experiments.fine_tuning.runs import run
from experiments.fine_tuning.studies import STUDIES
from experiments.options import check_only
from finetune.commands import Parser, run_command
from finetune.inference.options import positive_integer

logger = logging.getLogger(__name__)


def main() -> int:
    """Run one study."""
    options = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    plans = STUDIES[options.study].plans
    check_only(options.only, [plan.arm.label for plan in plans])
    folder = options.out / options.study
    for seed in options.seeds:
        for plan in plans:
            if options.only is None or plan.arm.label in options.only:
                result = run(folder, plan, seed=seed, bases=options.bases, num_steps=options.steps)
                loss = result.get("loss", result.get("losses"))
                logger.info("%s seed %d: %s nats", plan.arm.label, seed, loss)
    for path in write_report(folder, options.study):
        logger.info("%s", path)
    return 0


def _parse() -> argparse.Namespace:
    parser = Parser(
        prog="python -m experiments.fine_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tuning"), help="folder of the results")
    parser.add_argument(
        "--bases",
        type=Path,
        default=Path("runs/fine_tuning/bases"),
        help="folder of the trained base models, made where they are not there (%(default)s)",
    )
    parser.add_argument("--seeds", type=positive_integer, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="runs to make instead of all")
    parser.add_argument("--steps", type=positive_integer, help="of fine-tuning instead of the study's")
    parser.add_argument("--threads", type=positive_integer, default=1, help="of the CPU (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
