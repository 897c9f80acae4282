"""Talk to a trained model with a recording.

python generate.py --checkpoint runs/quickstart in.wav out.wav
python generate.py --checkpoint runs/first in.wav out.wav --save-memory ann.safetensors
"""

import sys

if __name__ == "__main__":
    try:
        from finetune.commands import run_command
        from finetune.inference.command import generate
    except KeyboardInterrupt:
        sys.exit(130)  # while PyTorch is being imported
    run_command(generate)
