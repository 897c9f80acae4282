"""The array job of annotate.py, with a fake of Python on the path."""

import os
import subprocess
from pathlib import Path

import pytest

from project_root import ROOT

SCRIPT = ROOT / "slurm" / "annotate.sbatch"


def submit(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run the script as a job does; what Python would be called with is printed, an argument per line."""
    fake = folder / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit "${FAKE_STATUS:-0}"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "VENV": str(folder / "none")} | variables
    return subprocess.run(["bash", str(SCRIPT)], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("identity", "lowest", "step", "shard"),
    [
        ("1", "1", "1", "1/4"),
        ("4", "1", "1", "4/4"),
        ("0", "0", "1", "1/4"),
        ("3", "0", "1", "4/4"),
        ("7", "1", "2", "4/4"),
    ],
)
def test_each_job_of_an_array_has_its_own_share(tmp_path, identity, lowest, step, shard):
    result = submit(
        tmp_path,
        SOURCE="my recordings/",
        SLURM_ARRAY_TASK_ID=identity,
        SLURM_ARRAY_TASK_MIN=lowest,
        SLURM_ARRAY_TASK_STEP=step,
        SLURM_ARRAY_TASK_COUNT="4",
        ARGS="--engine pocketsphinx",
        WORKERS="8",
    )
    expected = [
        "annotate.py",
        "my recordings/",
        "--shard",
        shard,
        "--workers",
        "8",
        "--engine",
        "pocketsphinx",
    ]
    assert (result.returncode, result.stdout.splitlines()) == (0, expected)


def test_alone_it_does_everything_and_passes_the_status_on(tmp_path):
    result = submit(tmp_path, SOURCE="data.jsonl", FAKE_STATUS="1")
    expected = ["annotate.py", "data.jsonl", "--shard", "1/1", "--workers", "1"]
    assert (result.returncode, result.stdout.splitlines()) == (1, expected)


def test_without_a_source_it_ends_with_one_line(tmp_path):
    result = submit(tmp_path)
    assert result.returncode == 2
    assert "SOURCE is not set" in result.stderr and len(result.stderr.splitlines()) == 1
