"""One seed: its files, its trainings and its measurement, as a user would make them."""

from dataclasses import dataclass
from pathlib import Path

from experiments.steps import run_python, train_once
from finetune.demo.recall.assets import make_recall_assets

BASE_CONFIG, SHORT_CONFIG, CONFIG = "recall_base.yaml", "recall_short.yaml", "recall.yaml"


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        num_items, num_train: of `make_recall_assets`.
        base_steps, short_steps, steps: of the trainings, None: the configurations'.
    """

    num_items: int
    num_train: int
    base_steps: int | None
    short_steps: int | None
    steps: int | None


def run_seed(folder: Path, sizes: Sizes, *, seed: int, lags: str) -> int:
    """Make what is not there yet of a seed.

    Args:
        folder: of the seed.
        sizes: how much of everything.
        seed: of items, dialogues, weights and order.
        lags: of the measurement.

    Returns:
        The exit status of the first step that did not end well, 0 when all did.

    Raises:
        UserError: a file cannot be made or used.
    """
    assets = make_recall_assets(
        folder / "assets", num_items=sizes.num_items, num_train=sizes.num_train, seed=seed
    )
    shared = {"moshi_paths.hf_repo_id": assets.model_dir, "seed": seed}
    base = {"data.train_data": assets.manifest("echo_train"), "max_steps": sizes.base_steps}
    short = {
        "data.train_data": assets.manifest("short_train"),
        "init_from": folder / "base",
        "max_steps": sizes.short_steps,
    }
    tuned = {
        "data.train_data": assets.manifest("recall_train"),
        "data.eval_data": assets.manifest("recall_eval"),
        "max_steps": sizes.steps,
    }
    for name, config, changes in (
        ("base", BASE_CONFIG, base),
        ("short", SHORT_CONFIG, short),
        ("ttt", CONFIG, tuned | {"init_from": folder / "short"}),
        ("none", CONFIG, tuned | {"init_from": folder / "base", "ttt.layers": "none"}),
    ):
        if status := train_once(config, folder / name, shared | changes):
            return status
    for name in ("ttt", "none"):
        where = ["--data", assets.items_dir, "--out", folder / f"recall_{name}", "--lags", lags]
        if status := run_python("evaluate.py", "recall", "--checkpoint", folder / name, *where):
            return status
    return 0
