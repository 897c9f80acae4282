"""Is a run healthy? python -m finetune.diagnose RUN_DIR."""

from finetune.commands import run_command
from finetune.diagnose.command import diagnose

if __name__ == "__main__":
    run_command(diagnose)
