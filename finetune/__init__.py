"""Fine-tuning of Moshi with Test-Time-Training layers, and what one does with the result.

A folder is a room of one subject; what lies directly here is shared by all, or is where people of
moshi-finetune look for it. docs/architecture.md shows the rooms and the ways through them.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

_SCRIPTS = ("annotate.py", "evaluate.py", "generate.py", "serve.py", "train.py")


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C while libraries are loaded, which takes seconds.

    An exception would show with a traceback through one of them, or be caught there and forgotten.
    """
    os._exit(128 + number)


def _is_command() -> bool:
    """Whether this process is one of the command lines of this project, not somebody's program."""
    if "-m" in sys.orig_argv[:-1] and sys.argv[:1] == ["-m"]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1].startswith("finetune.")
    program = Path(sys.argv[0] if sys.argv else "").absolute()
    is_script = program.parent == Path(__file__).absolute().parent.parent and program.name in _SCRIPTS
    return is_script or program.name == "moshi-ttt"


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)  # `finetune.commands.run_command` takes it back

# Threads of OpenMP that wait for each other keep their core for long. Where cores are fewer than threads,
# because something else runs too, most of the time is spent so. It counts until torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402

# Moshi compiles small functions when it is imported; on a CPU that costs 20 s at the first step.
if not torch.cuda.is_available():
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
