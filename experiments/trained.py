"""Trainings that are run once: what has ended is not trained again."""

from collections.abc import Mapping
from pathlib import Path

from finetune.checkpoint.layout import DONE_FILE, list_checkpoints
from finetune.demo.memory.training import train


def train_once(config: str, run_dir: Path, changes: Mapping[str, object]) -> int:
    """Run `train.py`, unless the run directory holds a checkpoint.

    Args:
        config: name of the configuration in `example/`.
        run_dir: of the run.
        changes: as `finetune.demo.memory.training.train` takes them.

    Returns:
        The exit status, 0 where the training is there.

    Raises:
        UserError: this is not the repository, which has train.py and configurations.
    """
    if any((path / DONE_FILE).is_file() for path in list_checkpoints(run_dir / "checkpoints")):
        return 0
    return train(config, {**changes, "run_dir": run_dir})
