"""Trainings of the quickstart's tiny model with smaller batches, by the product's own trainer."""

import logging
from pathlib import Path
from typing import Any

from finetune.args import TrainArgs
from finetune.demo.assets import DemoAssets
from finetune.errors import TrainingDivergedError
from finetune.training.run import run_training

logger = logging.getLogger(__name__)


def tiny_values(demo: DemoAssets, run_dir: Path, *, num_steps: int) -> dict[str, Any]:
    """The configuration as a YAML gives it, without evaluation and checkpoints; one outer rate of 2e-3."""
    return {
        "data": {"train_data": str(demo.train_jsonl), "shuffle": True, "num_workers": 0},
        "moshi_paths": {"hf_repo_id": str(demo.model_dir)},
        "run_dir": str(run_dir),
        "full_finetuning": True,
        "ttt": {"enable": True, "layers": "1,3", "weight_lr_multiplier": 1, "alpha_lr_multiplier": 1},
        "optim": {"lr": 2e-3, "pct_start": 0.1},
        "duration_sec": 10.24,
        "batch_size": 2,
        "max_steps": num_steps,
        "gradient_checkpointing": False,
        "param_dtype": "float32",
        "device": "cpu",
        "do_ckpt": False,
    }


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Values with others in their place, sections key by key."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def train_to_the_end(args: TrainArgs) -> str | None:
    """Train; returns why it diverged, None where it did not.

    Raises:
        ConfigError: the run directory is there already.
    """
    try:
        run_training(args)
    except TrainingDivergedError as error:
        logger.info("%s: %s", args.run_dir, error)
        return str(error)
    return None
