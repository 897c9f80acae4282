"""Fine-tune Moshi with Test-Time-Training layers.

python train.py --config example/quickstart.yaml
torchrun --nproc-per-node 8 -m train example/moshi_7B_ttt.yaml --optim.lr 1e-6
"""

if __name__ == "__main__":
    from finetune.commands import run_command
    from finetune.training.command import train

    run_command(train)
