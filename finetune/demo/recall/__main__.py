"""Make items for `evaluate.py recall`, and dialogues to train on: python -m finetune.demo.recall."""

from finetune.commands import run_command
from finetune.demo.recall.command import demo_recall

if __name__ == "__main__":
    run_command(demo_recall)
