"""Make a small Moshi and dialogues for it: python -m finetune.demo."""

from finetune.commands import run_command
from finetune.demo.command import demo

if __name__ == "__main__":
    run_command(demo)
