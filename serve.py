"""Talk to a trained model in a browser, or with `python -m moshi.client`.

python serve.py --checkpoint runs/quickstart
python serve.py --checkpoint runs/first --load-memory ann.safetensors --save-memory ann.safetensors
"""

if __name__ == "__main__":
    from finetune.commands import run_command
    from finetune.serving.command import serve

    run_command(serve)
