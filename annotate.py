"""Write word timings beside recordings.

python annotate.py recordings/ --engine pocketsphinx --workers 4
"""

import sys

if __name__ == "__main__":
    try:
        from finetune.annotation.command import annotate
        from finetune.commands import run_command
    except KeyboardInterrupt:
        sys.exit(130)  # while PyTorch is being imported
    run_command(annotate)
