"""Ctrl-C while a command still loads its libraries, which takes seconds: it ends, and says nothing."""

import os
import signal
import subprocess
import sys

import pytest

from finetune.console import COMMANDS
from project_root import ROOT

# As libraries do: some catch what is raised while they are imported, and go on or raise something else.
TORCH = """
import time
print("loading", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("torch cannot be imported")
"""
STARTS = [command.script.removeprefix("python ") for command in COMMANDS.values()]


@pytest.mark.parametrize("start", [*STARTS, "moshi-ttt"])
def test_ctrl_c_while_libraries_are_loaded_ends_every_command_without_a_word(tmp_path, start):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "moshi-ttt").write_text("from finetune.console import main\nmain()\n")
    arguments = [str(tmp_path / "moshi-ttt")] if start == "moshi-ttt" else start.split()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where tests run in the background, they were started with Ctrl-C ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("arguments", [["-c", "import finetune"], ["program.py"], ["train.py"]])
def test_programs_of_others_keep_their_ctrl_c(tmp_path, arguments):
    check = "import signal, finetune\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("class cuda:\n    is_available = bool\n")
    for name in ("program.py", "train.py"):
        (tmp_path / name).write_text(check)
    if arguments[0] == "-c":
        arguments = ["-c", check]
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert result.returncode == 0, result.stderr
