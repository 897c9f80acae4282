"""Check a data set: python -m finetune.data.check MANIFEST."""

from finetune.commands import run_command
from finetune.data.check.command import check

if __name__ == "__main__":
    run_command(check)
