"""Command line: `python -m finetune.demo.memory [--seed 1]`."""

import argparse
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from finetune.commands import Parser
from finetune.demo.made_folder import MAX_SEED
from finetune.demo.memory.assets import MAX_DIALOGUES, MIN_DIALOGUES, MemoryAssets, make_memory_assets
from finetune.demo.memory.compare import Arm, DialogueLosses, compare, describe, measure
from finetune.demo.memory.dialogues import NUM_LAYERS, REACH, WINDOW, WORD_FRAMES
from finetune.demo.memory.picture import plot_comparison
from finetune.demo.memory.training import train
from finetune.distributed import ConsoleHandler
from finetune.files import write_json
from finetune.inference.options import positive_integer, whole_number
from finetune.inference.terminal import say
from moshi_ttt.files.atomic_file import replacing

BASE_CONFIG, CONFIG = "memory_base.yaml", "memory.yaml"
RESULTS_FILE, PLOT_FILE = "results.json", "losses.png"

_FRAME_SEC = 0.08


def demo_memory(arguments: list[str] | None = None) -> int:
    """Make the dialogues, train the base, fine-tune it with TTT and without, compare.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status: that of the first training that did not end well, otherwise 0.

    Raises:
        UserError: the user has to mend something.
    """
    logging.basicConfig(level=logging.INFO, handlers=[ConsoleHandler()])
    options = _parse(arguments)
    start = time.monotonic()
    assets = make_memory_assets(
        options.out / "assets", num_train=options.num_train, num_eval=options.num_eval, seed=options.seed
    )
    _say_assets(assets)
    for config, changes in _trainings(options, assets):
        if status := train(config, changes):
            return status
    _compare(options.out, assets)
    say(f"in all {(time.monotonic() - start) / 60:.1f} minutes")
    return 0


def _trainings(options: argparse.Namespace, assets: MemoryAssets) -> list[tuple[str, dict[str, Any]]]:
    """Configuration and changed keys of each training, in order."""
    out = options.out
    shared = {"moshi_paths.hf_repo_id": assets.model_dir, "seed": options.seed}
    base = {
        "data.train_data": assets.manifest("echo_train"),
        "max_steps": options.base_steps,
        "run_dir": out / "base",
    }
    tuned = {
        "data.train_data": assets.manifest("recall_train"),
        "data.eval_data": assets.manifest("recall_eval"),
        "init_from": out / "base",
        "max_steps": options.steps,
    }
    return [
        (BASE_CONFIG, shared | base),
        (CONFIG, shared | tuned | {"run_dir": out / "ttt"}),
        (CONFIG, shared | tuned | {"run_dir": out / "none", "ttt.layers": "none"}),
    ]


def _compare(out: Path, assets: MemoryAssets) -> None:
    """Measure the arms on the held-out dialogues; print, write and draw the comparison."""
    say("\nMeasuring the held-out dialogues frame by frame.")
    manifest, hearings = assets.manifest("recall_eval"), assets.hearings("recall_eval")
    losses: dict[Arm, dict[str, DialogueLosses]] = {
        "none": measure(out / "none", manifest),
        "ttt": measure(out / "ttt", manifest),
        "frozen": measure(out / "ttt", manifest, "frozen"),
    }
    comparison = compare(losses, hearings)
    with replacing(out / RESULTS_FILE) as temporary:
        write_json(
            temporary, {"kind": "moshi-ttt memory demonstration", "version": 1, **comparison.to_json()}
        )
    plot_comparison(out / PLOT_FILE, losses, hearings)
    for line in describe(comparison):
        say(line)
    say(f"written: {out / RESULTS_FILE}, {out / PLOT_FILE}")


def _say_assets(assets: MemoryAssets) -> None:
    gaps = [
        heard.second[0] - heard.first[-1] - WORD_FRAMES for heard in assets.hearings("recall_eval").values()
    ]
    low, high = min(gaps) * _FRAME_SEC, max(gaps) * _FRAME_SEC
    say(f"{'reused' if assets.reused else 'made'} {assets.folder}")
    say(
        f"dialogues: a code of words comes back {low:.1f} to {high:.1f} s after its end; attention reaches "
        f"{REACH * _FRAME_SEC:.1f} s ({WINDOW} frames in each of {NUM_LAYERS} layers)"
    )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m finetune.demo.memory",
        description="Trains a tiny Moshi with a short attention window, with TTT and without, on dialogues "
        "in which a code of random words comes back late, and shows the difference on held-out ones.",
        allow_abbrev=False,
    )
    dialogues = partial(whole_number, lowest=MIN_DIALOGUES, highest=MAX_DIALOGUES)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/memory"), help="folder of everything (%(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=partial(whole_number, lowest=0, highest=MAX_SEED),
        default=1,
        help="of dialogues, weights and the order of the data (%(default)s)",
    )
    parser.add_argument(
        "--num-train", type=dialogues, default=800, help="dialogues to fine-tune on (%(default)s)"
    )
    parser.add_argument("--num-eval", type=dialogues, default=60, help="held-out dialogues (%(default)s)")
    parser.add_argument(
        "--base-steps", type=positive_integer, help="of the base model's training (as in its configuration)"
    )
    parser.add_argument(
        "--steps", type=positive_integer, help="of each fine-tuning (as in its configuration)"
    )
    return parser.parse_args(arguments)
