"""Several processes on a CPU, started as users start them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.checkpoint_files import list_checkpoints
from finetune.run import run_training
from run_helpers import read_metrics, run_args, run_values, write_yaml

ROOT = Path(__file__).parents[1]


def torchrun(config: Path, *options: str, while_running=None) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "train.py", "--config", str(config), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if while_running is not None:
            while_running(process)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


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
    assert result.stderr.count("error: ttt.layers: index 99 does not exist") == 1
    assert not (tmp_path / "run").exists()


def test_a_fault_that_one_process_meets_ends_all_with_its_line(demo, tmp_path):
    shutil.copytree(demo.out_dir / "data", tmp_path / "data")
    wav = tmp_path / "data" / "train" / "dialogue_001.wav"
    wav.write_bytes(wav.read_bytes()[:100_000])
    values = run_values(demo, tmp_path / "run")
    values["data"]["train_data"] = str(tmp_path / "data" / "train.jsonl")
    result = torchrun(write_yaml(tmp_path / "config.yaml", values))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "dialogue_001.wav: truncated" in lines[0]
    assert "RuntimeError" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_a_checkpoint_under_torchrun_too(demo, tmp_path):
    def interrupt_after_some_steps(process):
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)

    config = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", max_steps=10_000))
    result = torchrun(config, while_running=interrupt_after_some_steps)
    assert "of 10000 as asked" in result.stderr
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
