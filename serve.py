"""Talk to a trained model in a browser, or with `python -m moshi.client`.

python serve.py --checkpoint runs/quickstart
python serve.py --checkpoint runs/first --load-memory ann.safetensors --save-memory ann.safetensors
"""

import sys

if __name__ == "__main__":
    try:
        from finetune.commands import run_command
        from finetune.serving.command import serve
    except KeyboardInterrupt:
        sys.exit(130)  # while PyTorch is being imported
    run_command(serve)
