"""Several processes on a CPU, started as users start them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.run import run_training
from runs import read_metrics, run_args, run_values, write_yaml

ROOT = Path(__file__).parents[1]


def torchrun(config: Path, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "train.py", "--config", str(config), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_train_as_one_with_the_same_global_batch(demo, tmp_path):
    config = write_yaml(tmp_path / "two.yaml", run_values(demo, tmp_path / "two", batch_size=2, do_eval=True))
    result = torchrun(config)
    assert result.returncode == 0, result.stderr
    run_training(run_args(demo, tmp_path / "one", batch_size=4, do_eval=True))
    for split in ("train", "eval"):
        one, two = (read_metrics(tmp_path / name, split) for name in ("one", "two"))
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert a["step"] == b["step"]
            for key in ("text_loss", "audio_loss", "unigram_text_loss"):
                if key in a:
                    assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert "processes: 2" in result.stderr
    assert result.stderr.count("Saved") == 1


def test_a_bad_configuration_prints_its_line_under_torchrun_too(demo, tmp_path):
    config = write_yaml(tmp_path / "bad.yaml", run_values(demo, tmp_path / "run"))
    result = torchrun(config, "--ttt.layers", "99")
    assert result.returncode != 0
    assert "error: ttt.layers: index 99 does not exist" in result.stderr
    assert not (tmp_path / "run").exists()
