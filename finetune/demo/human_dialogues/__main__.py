"""Make dialogues of human actors: python -m finetune.demo.human_dialogues."""

from finetune.commands import run_command
from finetune.demo.human_dialogues.command import human_dialogues

if __name__ == "__main__":
    run_command(human_dialogues)
