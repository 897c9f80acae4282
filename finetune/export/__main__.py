"""Export a checkpoint: python -m finetune.export --checkpoint RUN --out DIR."""

from finetune.commands import run_command
from finetune.export.command import export

if __name__ == "__main__":
    run_command(export)
