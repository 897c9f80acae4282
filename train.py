"""Fine-tune Moshi with Test-Time-Training layers.

python train.py --config example/quickstart.yaml
torchrun --nproc-per-node 8 -m train example/moshi_7B_ttt.yaml --optim.lr 1e-6
"""

from finetune.cli import run_command
from finetune.console import train_command as main

if __name__ == "__main__":
    run_command(main)
