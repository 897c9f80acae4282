"""Make dialogues of Debian's telephone prompts: python -m finetune.demo.debian_prompts."""

from finetune.commands import run_command
from finetune.demo.debian_prompts.command import debian_prompts

if __name__ == "__main__":
    run_command(debian_prompts)
