"""Measure a trained model.

python evaluate.py long-context --checkpoint runs/first --data recordings/ --compare
"""

if __name__ == "__main__":
    from finetune.commands import run_command
    from finetune.evaluation.command import evaluate

    run_command(evaluate)
