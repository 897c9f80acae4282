"""The Slurm launcher, with a fake torchrun on the path."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "slurm" / "training" / "train_moshi_ttt.slurm"


def launch(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "none")} | variables
    return subprocess.run(["bash", str(SCRIPT)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_yaml_and_overrides_reach_one_process_per_gpu(tmp_path):
    result = launch(
        tmp_path, YAML="example/moshi_7B_ttt.yaml", SLURM_GPUS_ON_NODE="4", ARGS="--optim.lr 1e-6"
    )
    assert result.returncode == 0, result.stderr
    arguments = result.stdout.splitlines()[1:]
    expected = "--standalone --nproc-per-node 4 -m train example/moshi_7B_ttt.yaml --optim.lr 1e-6"
    assert arguments == expected.split()


def test_a_missing_configuration_ends_with_one_line(tmp_path):
    for variables, message in (
        ({}, "YAML is not set"),
        ({"YAML": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ):
        result = launch(tmp_path, **variables)
        assert result.returncode == 2
        assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_log_names_are_the_promised_ones():
    text = SCRIPT.read_text()
    assert "#SBATCH --output=logs/training/moshi_ttt.%j.log" in text
    assert "#SBATCH --error=logs/training/moshi_ttt.%j.err" in text
