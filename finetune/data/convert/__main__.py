"""Make a data set of ours from that of others: python -m finetune.data.convert FORMAT SOURCE --out DIR."""

from finetune.commands import run_command
from finetune.data.convert.command import convert

if __name__ == "__main__":
    run_command(convert)
