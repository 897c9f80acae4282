"""Commands of the installed package: the scripts of the repository's root under names of their own.

`moshi-ttt-train` is `train.py`, and so on; several processes start with
`torchrun --no-python --nproc-per-node 8 moshi-ttt-train config.yaml`.
"""

import sys

from finetune.cli import parse_train_command, run_command


def annotate() -> None:
    """Write word timings beside recordings."""
    from finetune.annotation.command import annotate as command

    run_command(lambda: command(sys.argv[1:]))


def evaluate() -> None:
    """Measure a trained model."""
    from finetune.evaluation.command import evaluate as command

    run_command(lambda: command(sys.argv[1:]))


def generate() -> None:
    """Talk to a trained model with a recording."""
    from finetune.inference.generate import generate as command

    run_command(lambda: command(sys.argv[1:]))


def serve() -> None:
    """Talk to a trained model in a browser."""
    from finetune.serving.command import serve as command

    run_command(lambda: command(sys.argv[1:]))


def train() -> None:
    """Fine-tune Moshi with Test-Time-Training layers."""
    run_command(train_command)


def train_command() -> int:
    """Parse the command line of train.py and do what it says; returns the exit status."""
    from finetune.dry_run import dry_run
    from finetune.run import run_training

    command = parse_train_command(sys.argv[1:])
    if command.dry_run:
        return dry_run(command.args, num_gpus=command.num_gpus, gpu_memory_gb=command.gpu_memory_gb)
    run_training(command.args)
    return 0
