"""`python -m finetune.data.encode`: what training then finds, whatever happened on the way."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import sphn
import torch

from finetune.base_model.codec import load_codec
from finetune.base_model.locate import find_model_files
from finetune.commands import run_command
from finetune.data.codes.cache import CodeCache
from finetune.data.encode import encode
from finetune.data.recordings.lines import load_manifest
from finetune.training.run import run_training
from run_helpers import run_args, run_values, write_yaml

NAMES = ("a", "b", "c", "größe 東京")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a manifest of four recordings, one of them mono; tests copy it."""
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for seed, name in enumerate(NAMES):
        sec = 1.0 + seed / 2
        channels = 1 if name == "c" else 2
        samples = np.random.default_rng(seed).uniform(-0.3, 0.3, (channels, round(sec * 24000)))
        sphn.write_wav(str(folder / f"{name}.wav"), samples.astype(np.float32).squeeze(), 24000)
        (folder / f"{name}.json").write_text('{"alignments": [["Hi", [0.1, 0.2], "SPEAKER_MAIN"]]}')
        os.utime(folder / f"{name}.wav", ns=(0, 10**18))
        lines.append(json.dumps({"path": f"{name}.wav", "duration": sec}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def data(source, tmp_path):
    shutil.copytree(source, tmp_path / "data")
    return tmp_path / "data" / "data.jsonl"


@pytest.fixture
def run(demo, capsys):
    """Run the command in this process; returns its exit status and output."""

    def run(*arguments):
        status = encode(["--base", str(demo.model_dir), "--devices", "cpu", *map(str, arguments)])
        return status, capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    """Run the command with a mistake; returns its one line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: encode(list(map(str, arguments))))
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def contents(data):
    """Hash of every file among the codes, hidden ones too."""
    files = (data.parent / ".moshi_ttt_codes").iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def add_lines(manifest, *lines):
    with open(manifest, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def is_alive(group):
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def command(demo, data, *arguments):
    """The command in a process group of its own, one thread."""
    line = [sys.executable, "-m", "finetune.data.encode", str(data), "--base", str(demo.model_dir)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_TORCH_COMPILE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where tests run in the background, they were started with Ctrl-C ignored, which is inherited.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*line, *arguments]
    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=listen, **pipes)


def test_training_finds_everything_encoded(demo, data, run, tmp_path, caplog):
    status, output = run(data)
    assert (status, output) == (0, "4 recordings: 4 encoded, 0 were before.\n")
    before = contents(data)
    values = {"train_data": str(data), "mono": "duplicate", "num_workers": 0}
    run_training(run_args(demo, tmp_path / "run", "full", data=values, duration_sec=0.8, max_steps=1))
    assert contents(data) == before and len(before) == len(NAMES)
    status, output = run(data)
    assert (status, output.splitlines()[-1]) == (0, "4 recordings: 0 encoded, 4 were before.")


def test_a_configuration_says_all(demo, data, tmp_path, capsys):
    codes = tmp_path / "codes"
    values = run_values(demo, tmp_path / "run", data={"train_data": str(data), "cache_dir": str(codes)})
    assert encode(["--config", str(write_yaml(tmp_path / "train.yaml", values)), "--devices", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("4 recordings: 4 encoded")
    assert len(list(codes.iterdir())) == 4 and not (data.parent / ".moshi_ttt_codes").exists()


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.slow)])
def test_killed_and_started_again_it_gives_what_it_gives_uninterrupted(demo, source, tmp_path, devices):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (2, 40 * 24000)).astype(np.float32)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(source, whole)
    for index in range(8):
        sphn.write_wav(str(whole / f"long{index}.wav"), np.roll(noise, index), 24000)
        os.utime(whole / f"long{index}.wav", ns=(0, 10**18))
        with open(whole / "data.jsonl", "a") as file:
            file.write(json.dumps({"path": f"long{index}.wav", "duration": 40}) + "\n")
    shutil.copytree(whole, killed)
    output, errors = command(demo, whole / "data.jsonl").communicate(timeout=120)
    assert output == "12 recordings: 12 encoded, 0 were before.\n", errors

    process = command(demo, killed / "data.jsonl", "--devices", devices)
    codes, deadline = killed / ".moshi_ttt_codes", time.monotonic() + 120
    while not list(codes.glob("*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = {name: digest for name, digest in contents(killed / "x").items() if name.endswith(".safetensors")}
    assert 0 < len(done) < 12
    assert done.items() <= contents(whole / "x").items(), "what is there is whole"
    (codes / ".some-host.1.left.tmp").write_bytes(b"half")
    os.utime(codes / ".some-host.1.left.tmp", (0, 0))

    output, errors = command(demo, killed / "data.jsonl", "--devices", devices).communicate(timeout=120)
    assert output == f"12 recordings: {12 - len(done)} encoded, {len(done)} were before.\n", errors
    assert contents(killed / "x") == contents(whole / "x")


def test_ctrl_c_ends_it_with_one_line_and_keeps_what_is_done(demo, source, tmp_path):
    shutil.copytree(source, tmp_path / "data")
    sphn.write_wav(str(tmp_path / "data/long.wav"), np.zeros((2, 2000 * 24000), np.float32), 24000)
    with open(tmp_path / "data/data.jsonl", "a") as file:
        file.write(json.dumps({"path": "long.wav", "duration": 2000}) + "\n")
    process = command(demo, tmp_path / "data/data.jsonl", "--devices", "cpu,cpu")
    codes, deadline = tmp_path / "data/.moshi_ttt_codes", time.monotonic() + 120
    while not list(codes.glob("*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted: what had been saved before is kept.\n"
    assert not list(codes.glob(".*.tmp"))
    while is_alive(process.pid):  # multiprocessing's own tracker takes a moment
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.02)


@pytest.mark.slow
def test_workers_end_quietly_when_the_command_is_killed(demo, source, tmp_path):
    shutil.copytree(source, tmp_path / "data")
    add_lines(tmp_path / "data/data.jsonl", *({"path": f"long{i}.wav", "duration": 100} for i in range(4)))
    for index in range(4):
        sphn.write_wav(str(tmp_path / f"data/long{index}.wav"), np.zeros((2, 100 * 24000), np.float32), 24000)
    process = command(demo, tmp_path / "data/data.jsonl", "--devices", "cpu,cpu")
    codes, deadline = tmp_path / "data/.moshi_ttt_codes", time.monotonic() + 120
    while not list(codes.glob("*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    _, errors = process.communicate(timeout=60)  # until the workers have closed their output too
    assert errors == ""
    assert not list(codes.glob(".*.tmp"))


def test_what_an_ended_worker_was_writing_is_removed(data, run, monkeypatch):
    worker = subprocess.Popen(["true"])
    worker.wait()

    def encode_one(cache, recording, _mimi):
        half = cache.folder(recording) / f".{socket.gethostname()}.{worker.pid}.0.tmp"
        half.parent.mkdir()
        half.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(CodeCache, "encode", encode_one)
    with pytest.raises(KeyboardInterrupt):
        run(data)
    assert contents(data) == {}


def test_recordings_that_cannot_be_used_are_listed_and_the_others_encoded(data, run):
    (data.parent / "b.wav").write_bytes(b"no audio")
    with open(data, "a") as file:
        file.write('{"path": "gone.wav", "duration": 1}\nnot JSON\n')
    status, output = run(data)
    *problems, summary = output.splitlines()
    assert (status, summary) == (1, "5 recordings: 3 encoded, 0 were before, 3 cannot be used.")
    assert sorted(re.search(r"data\.jsonl line (\d)", line)[1] for line in problems) == ["2", "5", "6"]
    assert any("b.wav: cannot be read as audio" in line for line in problems)
    assert any("gone.wav: cannot read the audio file" in line for line in problems)


def test_odd_lines_are_listed_in_one_line_each(data, run):
    add_lines(
        data,
        {"path": "\udcff.wav", "duration": 1},
        {"path": "\ud800.wav", "duration": 1},
        {"path": "\x1b[31m.wav", "duration": 1},
        {"path": "\0/nul.wav", "duration": 1},
        {"path": f"{'long' * 1000}/long.wav", "duration": 1.7e308},
        {"path": "b.wav/inside.wav", "duration": 1.7e308},
    )
    status, output = run(data)
    *problems, summary = output.splitlines()
    assert (status, summary) == (1, "10 recordings: 4 encoded, 0 were before, 6 cannot be used.")
    assert sorted(re.search(r"line (\d+)", line)[1] for line in problems) == ["10", *"56789"]
    assert output.replace("\n", "").isprintable()


def test_damaged_codes_are_no_codes(data, run):
    run(data)
    cut = next((data.parent / ".moshi_ttt_codes").glob("b.*"))
    cut.write_bytes(cut.read_bytes()[:-2])
    status, output = run(data)
    problem, summary = output.splitlines()
    assert (status, summary) == (1, "4 recordings: 0 encoded, 3 were before, 1 cannot be used.")
    assert f"line 2: {cut}: unusable cache file (it has" in problem and "delete it" in problem
    cut.unlink()
    assert run(data) == (0, "4 recordings: 1 encoded, 3 were before.\n")


def test_verify_finds_what_changed_and_changes_nothing(data, run):
    status, output = run(data, "--verify")
    assert status == 1 and output.count("no codes at") == 4
    run(data)
    assert run(data, "--verify") == (0, "4 recordings verified.\n")
    flipped = next((data.parent / ".moshi_ttt_codes").glob("b.*"))
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    audio = bytearray((data.parent / "a.wav").read_bytes())
    audio[-1] ^= 1
    (data.parent / "a.wav").write_bytes(audio)
    os.utime(data.parent / "a.wav", ns=(0, 10**18))
    before = contents(data)
    status, output = run(data, "--verify")
    assert status == 1 and len(output.splitlines()) == 3 and contents(data) == before
    assert "a.wav holds other bytes than when it was encoded" in output
    assert f"{flipped}: unusable cache file (its checksum is wrong" in output


def test_the_codes_are_those_that_training_makes(demo, data, run):
    run(data)
    info = find_model_files(run_args(demo, data).moshi_paths)
    mimi = load_codec(info, torch.device("cpu"))
    recordings = load_manifest(data, key="data")
    here, there = (
        CodeCache.of_model(info, num_codebooks=mimi.num_codebooks, cache_dir=folder)
        for folder in (None, str(data.parent / "other"))
    )
    there.fill(recordings, mimi, allow_mono=True, progress=False)
    assert all(torch.equal(here.load(r), there.load(r)) for r in recordings)


def test_mistakes_are_one_line(demo, data, refused, tmp_path):
    base = ("--base", demo.model_dir)
    assert "no codec" in refused(data)
    config = write_yaml(tmp_path / "a.yaml", run_values(demo, tmp_path / "run"))
    assert "both name a model" in refused(data, *base, "--config", config)
    assert "no data" in refused(*base)
    assert "--devices: device: 'tpu' is not a device" in refused(data, *base, "--devices", "cpu,tpu")
    assert "--devices: auto stands for all" in refused(data, *base, "--devices", "auto,cpu")
    assert "--cache-dir: '' is not the name of a folder" in refused(data, *base, "--cache-dir", "")
    assert "no such home directory" in refused(data, *base, "--cache-dir", "~nobody-has-this-name/codes")
    assert "none.jsonl does not exist" in refused(tmp_path / "none.jsonl", *base)
    (tmp_path / "file").write_text("")
    line = refused(data, *base, "--devices", "cpu", "--cache-dir", tmp_path / "file" / "codes")
    assert "--cache-dir: cannot write Mimi codes to" in line


def test_a_device_without_memory_is_no_fault_of_a_recording(demo, data, refused, monkeypatch):
    def encode_one(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(CodeCache, "encode", encode_one)
    line = refused(data, "--base", demo.model_dir, "--devices", "cpu")
    assert "--devices: cpu has not enough free memory" in line
