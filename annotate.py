"""Write word timings beside recordings.

python annotate.py recordings/ --engine pocketsphinx --workers 4
"""

if __name__ == "__main__":
    from finetune.annotation.command import annotate
    from finetune.commands import run_command

    run_command(annotate)
