"""Fine-tune Moshi with Test-Time-Training layers.

python train.py --config example/quickstart.yaml
torchrun --nproc-per-node 8 -m train example/moshi_7B_ttt.yaml --optim.lr 1e-6
"""

import sys

from finetune.cli import parse_train_command, run_command
from finetune.run import dry_run, run_training


def main() -> int:
    """Parse the command line and do what it says."""
    args, is_dry_run = parse_train_command(sys.argv[1:])
    if is_dry_run:
        dry_run(args)
    else:
        run_training(args)
    return 0


if __name__ == "__main__":
    run_command(main)
