"""Train the tiny Moshi of the quickstart with one outer rate and with three: same steps, same seeds.

    python -m experiments.compare_lr --out runs/compare_lr

Written to the folder, which must be new or empty: `results.json`, `report.md`, `compare_lr.png`, and of each
run its directory, with an audio sample of the end in `samples/`.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.compare_lr.report import table, write_figure
from experiments.compare_lr.runs import ARMS, arm_args, run_arm
from experiments.folders import make_empty_folder
from finetune.commands import Parser, run_command
from finetune.demo.assets import make_demo_assets
from finetune.files import write_json
from finetune.inference.options import positive_integer, seed
from moshi_ttt.files.atomic_file import replacing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: the folder is not empty.
    """
    options = parse(arguments)
    make_empty_folder(options.out)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    demo = make_demo_assets(
        options.out / "demo", num_train=options.dialogues, num_eval=2, minutes=1.0, seed=0
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for number in dict.fromkeys(options.seeds):
        for name, arm in ARMS.items():
            args = arm_args(
                arm,
                demo,
                options.out / f"{name}.seed{number}",
                num_steps=options.steps,
                batch_size=options.batch_size,
                seed=number,
            )
            runs[name].append(run_arm(args))
            with replacing(options.out / "results.json") as partial:
                write_json(partial, {"steps": options.steps, "runs": runs})
    report = table(runs)
    with replacing(options.out / "report.md") as partial:
        partial.write_text(report + "\n", encoding="utf-8")
    write_figure(runs, options.out / "compare_lr.png")
    print(report)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; a mistake ends the process with one line and status 2."""
    parser = Parser(
        prog="python -m experiments.compare_lr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare_lr"), help="folder (%(default)s)")
    parser.add_argument("--steps", type=positive_integer, default=80, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=seed, nargs="+", default=[1, 2], help="of weights and data")
    parser.add_argument("--batch-size", type=positive_integer, default=2, help="chunks (%(default)s)")
    parser.add_argument(
        "--dialogues", type=positive_integer, default=8, help="of a minute each, to train on (%(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
