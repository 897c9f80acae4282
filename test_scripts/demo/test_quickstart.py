"""The quickstart as the README has it: it learns, and its monitors find nothing."""

import subprocess
import sys

import pytest

from finetune.diagnose.command import diagnose
from project_root import ROOT
from run_helpers import read_metrics


@pytest.mark.slow
def test_the_quickstart_learns_and_no_monitor_fires(tmp_path, capsys):
    demo, run = tmp_path / "demo_assets", tmp_path / "run"
    paths = [
        *(
            "--data.train_data",
            demo / "data" / "train.jsonl",
            "--data.eval_data",
            demo / "data" / "eval.jsonl",
        ),
        *("--moshi_paths.hf_repo_id", demo / "model", "--run_dir", run),
    ]
    for command in (
        ["-m", "finetune.demo", "--out", demo],
        ["train.py", "--config", "example/quickstart.yaml", *paths],
    ):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "Steps: 200" in done.stdout and "Diagnostics:" not in done.stderr + done.stdout
    (*_, last) = read_metrics(run, "eval")
    assert last["text_loss"] < last["unigram_text_loss"] - 1
    assert last["audio_loss"] < last["unigram_audio_loss"] - 0.5
    assert diagnose([str(run)]) == 0
    assert "Healthy: 20 measurements until step 200" in capsys.readouterr().out
