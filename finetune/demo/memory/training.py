"""Runs the repository's train.py on the two configurations of the demonstration."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from finetune.errors import UserError
from finetune.inference.terminal import say

_ROOT = Path(__file__).resolve().parents[3]


def train(config: str, changes: Mapping[str, object]) -> int:
    """Start `python train.py --config example/<config>` with some keys changed, and wait for its end.

    A process of its own: what is shown is the command that anybody can type.

    Args:
        config: name of the configuration in `example/`.
        changes: keys and values; those that are None stay as the configuration has them.

    Returns:
        The exit status; what went wrong has been said.

    Raises:
        UserError: this is not the repository, which has train.py and configurations.
    """
    for file in (_ROOT / "train.py", _ROOT / "example" / config):
        if not file.is_file():
            raise UserError(
                f"{file} does not exist: the demonstration needs train.py and example/ of the repository, "
                "which are not installed with the package; run it in a clone."
            )
    config_path, *options = arguments(config, changes)[1:]
    say(f"\n$ python train.py --config example/{config} {shlex.join(options)}")
    command = [sys.executable, str(_ROOT / "train.py"), "--config", config_path, *options]
    return subprocess.run(command).returncode


def arguments(config: str, changes: Mapping[str, object]) -> list[str]:
    """The arguments of train.py, see `train`."""
    options = [
        part for key, value in changes.items() if value is not None for part in (f"--{key}", str(value))
    ]
    return ["--config", str(_ROOT / "example" / config), *options]
