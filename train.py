"""Fine-tune Moshi with Test-Time-Training layers.

python train.py --config example/quickstart.yaml
torchrun --nproc-per-node 8 -m train example/moshi_7B_ttt.yaml --optim.lr 1e-6
"""

import sys

from finetune.cli import parse_train_command, run_command
from finetune.dry_run import dry_run
from finetune.run import run_training


def main() -> int:
    """Parse the command line and do what it says."""
    command = parse_train_command(sys.argv[1:])
    if command.dry_run:
        return dry_run(command.args, num_gpus=command.num_gpus, gpu_memory_gb=command.gpu_memory_gb)
    run_training(command.args)
    return 0


if __name__ == "__main__":
    run_command(main)
