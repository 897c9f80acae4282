"""Measure a trained model.

python evaluate.py long-context --checkpoint runs/first --data recordings/ --compare
"""

import sys

if __name__ == "__main__":
    try:
        from finetune.commands import run_command
        from finetune.evaluation.command import evaluate
    except KeyboardInterrupt:
        sys.exit(130)  # while PyTorch is being imported
    run_command(evaluate)
