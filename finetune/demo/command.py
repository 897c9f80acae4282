"""Command line: `python -m finetune.demo [--out demo_assets]`."""

import argparse
import logging
from pathlib import Path

from finetune.commands import Parser
from finetune.demo.assets import DemoAssets, make_demo_assets
from finetune.distributed import ConsoleHandler


def demo(arguments: list[str] | None = None) -> int:
    """Make the demo's files and print what there is.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: the user has to mend something.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parse(arguments)
    assets = make_demo_assets(
        options.out,
        num_train=options.num_train,
        num_eval=options.num_eval,
        minutes=options.minutes,
        seed=options.seed,
    )
    print(describe(assets))
    return 0


def describe(assets: DemoAssets) -> str:
    """A summary of the assets for people."""
    report = assets.report
    settings = assets.settings
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report["seconds"].items())
    entropies = " ".join(f"{use['entropy_bits']:.2f}" for use in report["codebooks"])
    used = " ".join(str(use["num_used"]) for use in report["codebooks"])
    return "\n".join(
        (
            f"{'reused' if assets.reused else 'made'} {assets.out_dir}",
            f"dialogues:  {settings['num_train']} in {assets.train_jsonl}",
            f"            {settings['num_eval']} in {assets.eval_jsonl}",
            f"audio:      {report['audio_hours']:.2f} hours, 24 kHz stereo",
            f"model:      {assets.model_dir}, text vocabulary {report['vocabulary']}",
            f"codebooks:  entropy {entropies} of {report['max_entropy_bits']:g} bits",
            f"            entries in use {used}",
            f"time:       {parts}, together {sum(report['seconds'].values()):.1f} s",
        )
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m finetune.demo", description="Makes a small Moshi and dialogues for it.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_assets"), help="directory to make (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="length of each dialogue (%(default)s)")
    parser.add_argument("--num-train", type=int, default=16, help="dialogues to train on (%(default)s)")
    parser.add_argument("--num-eval", type=int, default=4, help="held-out dialogues (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same files (%(default)s)"
    )
    return parser.parse_args(arguments)
