"""Extend a base model: python -m finetune.extend --base MODEL --tokenizer FILE --predict-user --out DIR."""

from finetune.commands import run_command
from finetune.extend.command import extend

if __name__ == "__main__":
    run_command(extend)
