"""Talking and evaluating on an NVIDIA GPU, through CUDA graphs: the same tokens and losses as on the CPU."""

import copy
import csv
import json
import sys

import pytest
import sphn
import torch
from moshi.models.lm import LMGen

from audio_helpers import noise
from conftest import make_codes, make_tiny_lm
from evaluation_helpers import open_ttt, run_evaluate
from finetune.commands import run_command
from finetune.inference.command import generate

pytestmark = pytest.mark.gpu

RATE = 24000


def greedy_tokens(lm, heard):
    """Text and audio of each frame in which two users say `heard`, `[2, K, T]`; row 1 starts again.

    None where a row has none yet.
    """
    generator = LMGen(lm, use_sampling=False)
    tokens = []
    with generator.streaming(2), torch.no_grad():
        for number, frame in enumerate(heard.to(lm.device).split(1, 2)):
            if number == 25:
                generator.reset_streaming(torch.tensor([False, True], device=lm.device))
            out = generator.step(frame)
            tokens.append(None if out is None else out.flatten(1).tolist())
    return tokens


def test_a_conversation_in_float64_has_the_tokens_of_the_cpu():
    lm = open_ttt(make_tiny_lm(context=10))
    models = [copy.deepcopy(lm).to(device) for device in ("cpu", "cuda")]
    heard = make_codes(models[0], 2, 60)[:, 1 + models[0].dep_q :]
    on_cpu, on_gpu = (greedy_tokens(lm, heard) for lm in models)
    assert len({str(tokens) for tokens in on_cpu}) > 10
    assert on_gpu == on_cpu


@pytest.fixture
def recording(tmp_path):
    path = tmp_path / "user.wav"
    sphn.write_wav(str(path), noise(60 * 1920, seed=1), RATE)
    return path


def test_generate_talks_on_the_gpu_and_goes_on_from_a_memory(untrained_run, recording, tmp_path, monkeypatch):
    def talk(*options):
        report = tmp_path / "report.json"
        arguments = ["--checkpoint", untrained_run("lora_ttt"), recording, tmp_path / "out.wav"]
        arguments += ["--device", "cuda", "--report", report, *options]
        monkeypatch.setattr(sys, "argv", ["generate.py"])
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: generate([str(argument) for argument in arguments]))
        assert exit_.value.code == 0
        return json.loads(report.read_text())

    first = talk("--save-memory", tmp_path / "memory.safetensors")
    assert first["num_frames"] == 60 and sphn.read(str(tmp_path / "out.wav"))[0].any()
    assert talk("--load-memory", tmp_path / "memory.safetensors")["num_frames"] == 60


def test_long_context_losses_are_those_of_the_cpu(untrained_run, recording, tmp_path, capsys):
    results = {}
    for device in ("cpu", "cuda"):
        arguments = ["long-context", "--checkpoint", untrained_run("ttt"), "--data", recording]
        arguments += ["--device", device, "--out", tmp_path / device, "--dtype", "float32"]
        status, _, errors = run_evaluate(capsys, *arguments)
        assert (status, errors) == (0, [])
        (path,) = (tmp_path / device).rglob("positions.csv")
        with path.open() as file:
            results[device] = list(csv.DictReader(file))
    assert len(results["cpu"]) == len(results["cuda"]) > 0
    for on_cpu, on_gpu in zip(results["cpu"], results["cuda"], strict=True):
        for name, value in on_cpu.items():
            assert on_gpu[name] == value or float(on_gpu[name]) == pytest.approx(float(value), abs=1e-4), name
