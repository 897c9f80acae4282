"""Talk to a trained model in a browser, or with `python -m moshi.client`.

python serve.py --checkpoint runs/quickstart
python serve.py --checkpoint runs/first --load-memory ann.safetensors --save-memory ann.safetensors
"""

import sys

from finetune.cli import run_command
from finetune.serving.command import serve

if __name__ == "__main__":
    run_command(lambda: serve(sys.argv[1:]))
