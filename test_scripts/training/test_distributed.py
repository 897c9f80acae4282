"""Several processes on a CPU, started as users start them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch
from safetensors.torch import load_file

from condition_helpers import make_conditioned_demo
from faulty_data import wav
from finetune.checkpoint.layout import list_checkpoints, step_of
from finetune.config_io import load_train_args
from finetune.data.recordings.skipped import SKIPPED_FILE
from finetune.training.run import run_training
from project_root import ROOT
from run_helpers import MODES, read_metrics, run_args, run_values, saved_weights, write_yaml


def torchrun(*arguments: object, while_running=None) -> subprocess.CompletedProcess:
    """Run a script of this repository in two processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
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
        stdout, stderr = process.communicate(timeout=1200)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


SETTINGS = {"duration_sec": 1.6, "do_eval": True, "num_microbatches": 2, "gradient_checkpointing": True}
WITHOUT_TTT = {mode: {"mode": mode} for mode in ("full", "lora")}
CASES = {
    **{mode: {"mode": mode} for mode in MODES if mode not in WITHOUT_TTT},
    "ddp": {"mode": "lora_ttt", "parallel": {"strategy": "ddp"}},
    "hybrid": {"mode": "lora_ttt", "parallel": {"strategy": "fsdp", "replicas": 2}},
    "bfloat16": {"mode": "lora_ttt", "param_dtype": "bfloat16", "sample_freq": 3, "sample_duration_sec": 0.5},
}


def assert_same_losses(one: Path, two: Path, *, steps: int, tolerance: float = 1e-5) -> None:
    for split in ("train", "eval"):
        a_records, b_records = (read_metrics(path, split) for path in (one, two))
        assert len(a_records) == len(b_records)
        for a, b in zip(a_records, b_records, strict=True):
            assert a["step"] == b["step"]
            for key in ("loss", "text_loss", "audio_loss", *(k for k in a if k.startswith("grad_norm"))):
                if key in a:
                    assert a[key] == pytest.approx(b[key], rel=tolerance), (key, a["step"])
    assert a_records[-1]["step"] == steps


def write_cases(demo, folder: Path, cases: dict, batch_size: int, **settings) -> list[Path]:
    configs = []
    for name, case in cases.items():
        values = run_values(demo, folder / name, **(SETTINGS | settings | case), batch_size=batch_size)
        configs.append(write_yaml(folder / f"{name}.yaml", values))
    return configs


@pytest.fixture(scope="module")
def two_processes(demo, tmp_path_factory):
    """Three steps of every case in two processes, each with half of the global batch."""
    folder = tmp_path_factory.mktemp("two")
    result = torchrun("test_scripts/helpers/train_many.py", *write_cases(demo, folder, CASES, batch_size=1))
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture(scope="module")
def in_one_process(demo, tmp_path_factory):
    """The folder of the same steps of a mode and dtype in this process, run once."""
    folder = tmp_path_factory.mktemp("one")

    def train(mode: str, param_dtype: str = "float32") -> Path:
        path = folder / f"{mode}.{param_dtype}"
        if not path.exists():
            run_training(run_args(demo, path, mode, batch_size=2, **SETTINGS, param_dtype=param_dtype))
        return path

    return train


def assert_trained_alike(one: Path, two: Path, mode: str, *, tolerance: float = 1e-5) -> None:
    """Losses, and the gradients of every group of parameters."""
    assert_same_losses(one, two, steps=3, tolerance=tolerance)
    groups = {"full": 1, "full_ttt": 3, "lora": 1, "lora_ttt": 3, "ttt": 2}
    norms = [key for key in read_metrics(one, "train")[0] if key.startswith("grad_norm_")]
    assert len(norms) == groups[mode]
    assert all(record[key] > 0 for record in read_metrics(two, "train") for key in norms)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_with_the_same_global_batch(two_processes, in_one_process, case):
    mode, dtype = CASES[case]["mode"], CASES[case].get("param_dtype", "float32")
    paths = in_one_process(mode, dtype), two_processes[0] / case
    assert_trained_alike(*paths, mode, tolerance=1e-5 if dtype == "float32" else 1e-2)
    for path in paths:
        assert load_train_args(path / "args.yaml").ttt.key_shift == 1
        assert read_metrics(path, "train")[-1]["memory_carried"] > 0


@pytest.mark.slow
def test_two_processes_train_as_one_without_ttt(in_one_process, demo, tmp_path):
    configs = write_cases(demo, tmp_path, WITHOUT_TTT, batch_size=1)
    result = torchrun("test_scripts/helpers/train_many.py", *configs)
    assert result.returncode == 0, result.stderr
    for mode in WITHOUT_TTT:
        assert_trained_alike(in_one_process(mode), tmp_path / mode, mode)


def test_both_processes_work_and_one_writes(two_processes):
    folder, result = two_processes
    assert result.stdout.count("processes: 2") == result.stdout.count("Saved") == len(CASES)
    assert all(len(list_checkpoints(folder / case / "checkpoints")) == 1 for case in CASES)


def test_a_sharded_model_speaks_its_samples(two_processes):
    audio, rate = sphn.read(str(two_processes[0] / "bfloat16" / "samples" / "step_3.wav"))
    assert rate == 24_000 and audio.shape == (2, 6 * 1920)
    assert audio[0].any()


def test_exports_of_sharded_training_are_those_of_one_process(two_processes, in_one_process):
    for mode in ("full_ttt", "lora_ttt"):
        for file in ("ttt", "consolidated" if mode == "full_ttt" else "lora"):
            one, two = (
                load_file(list_checkpoints(path / "checkpoints")[0] / f"consolidated/{file}.safetensors")
                for path in (in_one_process(mode), two_processes[0] / mode)
            )
            assert one.keys() == two.keys()
            assert all((one[name] - two[name]).abs().max() < 1e-4 for name in one)


@pytest.mark.slow
def test_two_processes_train_conditioners_as_one(demo, tmp_path):
    conditioned = make_conditioned_demo(demo, tmp_path / "assets", mood="sum", style="cross")
    cases = {
        "full": {"mode": "full_ttt", "parallel": {"strategy": "fsdp"}},
        "ddp": {"mode": "full_ttt", "parallel": {"strategy": "ddp"}},
    }
    settings = SETTINGS | {"max_steps": 2, "num_microbatches": 1}
    configs = []
    for name, case in cases.items():
        values = run_values(conditioned, tmp_path / name, **(settings | case), batch_size=1)
        configs.append(write_yaml(tmp_path / f"{name}.yaml", values))
    result = torchrun("test_scripts/helpers/train_many.py", *configs)
    assert result.returncode == 0, result.stderr
    run_training(run_args(conditioned, tmp_path / "one", "full_ttt", batch_size=2, **settings))
    for name in cases:
        assert_same_losses(tmp_path / "one", tmp_path / name, steps=2)
        one, two = saved_weights(tmp_path / "one", 2), saved_weights(tmp_path / name, 2)
        names = [key for key in one if key.startswith("condition_provider.")]
        assert names and all((one[key] - two[key]).abs().max() < 1e-4 for key in names)


def run_and_resume(demo, folder: Path, *, steps: int, stop: int) -> Path:
    """Run with a checkpoint at a stop, in one process and in two, and their continuations in both."""
    settings = {"max_steps": steps, "ckpt_freq": stop, "eval_freq": stop + 1, "num_ckpt_keep": None}
    checkpoint = f"checkpoints/checkpoint_{stop:06d}"
    (config,) = write_cases(demo, folder, {"two": {}}, batch_size=1, **settings)
    (one,) = write_cases(demo, folder, {"one": {}}, batch_size=2, **settings)
    run_training(load_train_args(one))
    resumed = []
    for name, source in (("two_two", "two"), ("one_two", "one")):
        case = {name: {"resume": str(folder / source / checkpoint)}}
        resumed += write_cases(demo, folder, case, batch_size=1, **settings)
    result = torchrun("test_scripts/helpers/train_many.py", config, *resumed)
    assert result.returncode == 0, result.stderr
    for name, source in (("one_one", "one"), ("two_one", "two")):
        case = {name: {"resume": str(folder / source / checkpoint)}}
        (config,) = write_cases(demo, folder, case, batch_size=2, **settings)
        run_training(load_train_args(config))
    return folder


def final_tensors(run_dir: Path) -> dict:
    folder = list_checkpoints(run_dir / "checkpoints")[-1] / "consolidated"
    return load_file(folder / "lora.safetensors") | load_file(folder / "ttt.safetensors")


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if "_sec" not in key and "memory_gb" not in key}


def records_after_the_stop(whole: Path, resumed: Path, split: str) -> list[tuple[dict, dict]]:
    """What both runs recorded after the step of the first checkpoint, which the second went on from."""
    stop = step_of(list_checkpoints(whole / "checkpoints")[0])
    later = [record for record in read_metrics(whole, split) if record["step"] > stop]
    return list(zip(later, read_metrics(resumed, split), strict=True))


def assert_equal_to_the_last_bit(whole: Path, resumed: Path) -> None:
    expected, found = final_tensors(whole), final_tensors(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for split in ("train", "eval"):
        for a, b in records_after_the_stop(whole, resumed, split):
            assert without_times(a) == without_times(b)


def assert_equal_but_for_rounding(whole: Path, resumed: Path) -> None:
    for split in ("train", "eval"):
        for a, b in records_after_the_stop(whole, resumed, split):
            for key in ("loss", "text_loss", "audio_loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-5)
    expected, found = final_tensors(whole), final_tensors(resumed)
    assert all((expected[name] - found[name]).abs().max() < 1e-4 for name in expected)


@pytest.fixture(scope="module")
def three_of_five(demo, tmp_path_factory):
    return run_and_resume(demo, tmp_path_factory.mktemp("three"), steps=5, stop=3)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(three_of_five, processes):
    assert_equal_to_the_last_bit(three_of_five / processes, three_of_five / f"{processes}_{processes}")
    assert read_metrics(three_of_five / f"{processes}_{processes}", "train")[0]["memory_carried"] > 0


@pytest.mark.parametrize(("source", "resumed"), [("two", "two_one"), ("one", "one_two")])
def test_a_run_resumes_on_another_number_of_processes(three_of_five, source, resumed):
    assert_equal_but_for_rounding(three_of_five / source, three_of_five / resumed)


@pytest.mark.slow
def test_resuming_at_step_7_of_20(demo, tmp_path):
    run_and_resume(demo, tmp_path, steps=20, stop=7)
    for processes in ("one", "two"):
        assert_equal_to_the_last_bit(tmp_path / processes, tmp_path / f"{processes}_{processes}")
    assert_equal_but_for_rounding(tmp_path / "two", tmp_path / "two_one")
    assert_equal_but_for_rounding(tmp_path / "one", tmp_path / "one_two")


@pytest.mark.slow
def test_twenty_steps_in_two_processes_equal_twenty_in_one(demo, tmp_path):
    result = torchrun(
        "test_scripts/helpers/train_many.py",
        *write_cases(demo, tmp_path, WITHOUT_TTT | CASES, batch_size=1, max_steps=20),
    )
    assert result.returncode == 0, result.stderr
    for case, values in (WITHOUT_TTT | CASES).items():
        one = tmp_path / f"{case}_one"
        if "param_dtype" not in values:
            run_training(run_args(demo, one, values["mode"], batch_size=2, **(SETTINGS | {"max_steps": 20})))
            assert_same_losses(one, tmp_path / case, steps=20)


def test_a_bad_configuration_prints_its_line_under_torchrun_too(demo, tmp_path):
    config = write_yaml(tmp_path / "bad.yaml", run_values(demo, tmp_path / "run"))
    result = torchrun("train.py", "--config", config, "--ttt.layers", "99")
    assert result.returncode != 0
    assert result.stderr.count("error: ttt.layers: index 99 does not exist") == 1
    assert not (tmp_path / "run").exists()


def damage(path: Path) -> None:
    """Put a sample into a recording that only who decodes it sees."""
    samples = sphn.read(str(path))[0]
    samples[0, -1] = np.nan
    path.write_bytes(wav(samples, bits=32, form=3))


def test_a_fault_that_one_process_meets_ends_all_with_its_line(demo, tmp_path):
    shutil.copytree(demo.out_dir / "data", tmp_path / "data")
    damage(tmp_path / "data" / "train" / "dialogue_001.wav")
    values = run_values(demo, tmp_path / "run")
    values["data"]["train_data"] = str(tmp_path / "data" / "train.jsonl")
    result = torchrun("train.py", "--config", write_yaml(tmp_path / "config.yaml", values))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "dialogue_001.wav: holds NaN" in lines[0]
    assert "RuntimeError" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_process_cannot_use_is_left_out_by_all(demo, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(demo.train_jsonl.parent, data)
    lines = data.joinpath("train.jsonl").read_text().splitlines()[:4]
    data.joinpath("train.jsonl").write_text("\n".join(lines))
    damaged = data / json.loads(lines[1])["path"]
    damage(damaged)
    runs = {name: tmp_path / name for name in ("one", "two")}
    configs = []
    for name, run_dir in runs.items():
        values = run_values(demo, run_dir, "full", do_eval=True, batch_size=2 if name == "one" else 1)
        values["data"] |= {"train_data": str(data / "train.jsonl"), "on_error": "skip"}
        values["data"]["cache_dir"] = str(tmp_path / f"codes-{name}")
        configs.append(write_yaml(tmp_path / f"{name}.yaml", values))
    result = torchrun("test_scripts/helpers/train_many.py", configs[1])
    assert result.returncode == 0, result.stderr
    run_training(load_train_args(configs[0]))
    skipped = json.loads((runs["two"] / SKIPPED_FILE).read_text())
    assert [(entry["line"], entry["path"]) for entry in skipped] == [(2, str(damaged))]
    assert "NaN" in skipped[0]["reason"]
    assert skipped == json.loads((runs["one"] / SKIPPED_FILE).read_text())
    assert_same_losses(runs["one"], runs["two"], steps=3)


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_under_torchrun_too(demo, tmp_path):
    def interrupt_after_some_steps(process):
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)

    config = write_yaml(tmp_path / "config.yaml", run_values(demo, tmp_path / "run", max_steps=10_000))
    result = torchrun("train.py", "--config", config, while_running=interrupt_after_some_steps)
    assert "of 10000 as asked" in result.stdout
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1
