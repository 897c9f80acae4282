"""Steps of experiments that use the commands as anybody would: each is shown, a training is run once."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune.checkpoint.layout import DONE_FILE, list_checkpoints
from finetune.demo.memory.training import train
from finetune.inference.terminal import say

_ROOT = Path(__file__).resolve().parents[1]


def seed_folders(folder: Path) -> list[Path]:
    """The folders `seed<number>` of an experiment, in order of the numbers."""
    return sorted(folder.glob("seed*/"), key=lambda path: int(path.name.removeprefix("seed")))


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


def run_python(*arguments: object) -> int:
    """Run `python …` in a process of its own.

    Args:
        arguments: a script of the repository's root, or `-m` and a module, then texts and paths for it.

    Returns:
        The exit status; what went wrong has been said.
    """
    first, *others = map(str, arguments)
    say(f"\n$ python {shlex.join([first, *others])}")
    started = [first] if first == "-m" else [str(_ROOT / first)]
    return subprocess.run([sys.executable, *started, *others]).returncode
