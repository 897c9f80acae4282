"""However a run ends, all its processes end with it, with one line and the status that belongs to it."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from finetune import checkpointing
from finetune.checkpoint.layout import list_checkpoints
from finetune.data.args import DataArgs
from finetune.data.codes.cache import CodeCache
from finetune.training.trainer import Trainer
from project_root import ROOT
from run_helpers import command_line, run_values, write_yaml
from train_with_trouble import with_trouble

HELPER = Path(__file__).with_name("train_with_trouble.py")
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT_SEC = 30
WAYS = {
    "full_disk": (2, "error: ", "No space left on device"),
    "lost_codes": (2, "error: ", "dialogue_00"),
    "lost_worker": (2, "error: ", "a process that loads data was killed by signal 9"),
    "divergence": (1, "error: ", "step 3: "),
    "two_interrupts": (130, "interrupted: ", "what had been saved before is kept."),
    "two_requests_to_end": (143, "terminated: ", "what had been saved before is kept."),
}
BEGINNINGS = ("error: ", "interrupted: ", "terminated: ")


def write_config(demo, folder: Path, **settings) -> Path:
    """A run that loads its data as runs do by default."""
    settings = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 1000, "ckpt_freq": 2} | settings
    values = run_values(demo, folder / "run", **settings)
    values["data"]["cache_dir"] = str(folder / "codes")
    del values["data"]["num_workers"]
    return write_yaml(folder / "config.yaml", values)


def last_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith(BEGINNINGS)]


def test_runs_load_their_data_in_processes_by_default():
    assert DataArgs().num_workers > 0


@pytest.mark.parametrize("way", WAYS)
def test_every_way_out_of_a_run_ends_its_loader_processes(demo, tmp_path, monkeypatch, capfd, way):
    monkeypatch.setattr(checkpointing, "write_json", checkpointing.write_json)  # to be put back
    monkeypatch.setattr(Trainer, "_train_step", with_trouble(way))
    status, beginning, text = WAYS[way]
    handlers = [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)]
    started = time.monotonic()
    assert command_line(monkeypatch, write_config(demo, tmp_path)) == status
    gc.collect()  # what is ended by luck only is not counted
    assert multiprocessing.active_children() == []
    assert time.monotonic() - started < LIMIT_SEC
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    (line,) = last_lines(errors)
    assert line.startswith(beginning) and text in line
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "checkpoint_000002"
    assert handlers == [signal.getsignal(n) for n in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("way", ["two_interrupts", "divergence"])
def test_a_checkpoint_in_the_background_is_finished_unless_somebody_asks_twice_to_end(
    demo, tmp_path, monkeypatch, way
):
    write_json, go_on = checkpointing.write_json, threading.Event()

    def write_slowly(path, value):
        go_on.wait(0.5 if way == "divergence" else 2 * LIMIT_SEC)
        write_json(path, value)

    monkeypatch.setattr(checkpointing, "write_json", write_slowly)
    monkeypatch.setattr(Trainer, "_train_step", with_trouble(way))
    config, before = write_config(demo, tmp_path, ckpt_async=True), set(threading.enumerate())
    assert command_line(monkeypatch, config) == WAYS[way][0]
    assert [thread for thread in set(threading.enumerate()) - before if not thread.daemon] == []
    saved = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == ([] if way == "two_interrupts" else ["checkpoint_000002"])
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(LIMIT_SEC)  # what is still written shall not be in the way of other tests


def test_a_request_to_end_while_recordings_are_encoded_ends_with_one_line(demo, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(CodeCache, "encode", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    assert command_line(monkeypatch, write_config(demo, tmp_path)) == 143
    assert last_lines(capfd.readouterr().err) == ["terminated: what had been saved before is kept."]


def run_in_trouble(demo, folder: Path, way: str, *start: str) -> tuple[int, str]:
    """A run in processes of its own; this returns when all that hold its output have ended."""
    command = [sys.executable, *start, str(HELPER), way, "--config", str(write_config(demo, folder))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):  # the trouble comes now
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    try:
        _, errors = process.communicate(timeout=LIMIT_SEC)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, errors


def test_a_run_that_fails_leaves_no_process_behind(demo, tmp_path):
    status, errors = run_in_trouble(demo, tmp_path, "lost_codes")
    assert status == 2 and "Traceback" not in errors
    assert len(last_lines(errors)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lost_rank", "full_disk", "lost_codes", "lost_worker", "divergence"])
def test_every_way_out_ends_all_ranks_with_one_line(demo, tmp_path, way):
    status, errors = run_in_trouble(demo, tmp_path, way, *TWO_RANKS)
    assert status == 1  # torchrun's
    (line,) = last_lines(errors)
    assert WAYS.get(way, (2, "error: ", "another process of this run was lost"))[2] in line
    assert "[rank" not in errors  # how tracebacks of ranks begin
