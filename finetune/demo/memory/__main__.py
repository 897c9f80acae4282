"""Show what the memory gives: python -m finetune.demo.memory."""

from finetune.commands import run_command
from finetune.demo.memory.command import demo_memory

if __name__ == "__main__":
    run_command(demo_memory)
