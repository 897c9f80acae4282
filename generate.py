"""Talk to a trained model with a recording.

python generate.py --checkpoint runs/quickstart in.wav out.wav
python generate.py --checkpoint runs/first in.wav out.wav --save-memory ann.safetensors
"""

if __name__ == "__main__":
    from finetune.commands import run_command
    from finetune.inference.command import generate

    run_command(generate)
