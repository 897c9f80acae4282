"""Where training starts: base models and checkpoints of moshi-finetune, talked to, evaluated and exported."""

import json
import shutil

import numpy as np
import pytest
import sphn
import torch

from evaluation_helpers import run_evaluate
from finetune.args import ModelPaths
from finetune.base_model.locate import find_model_files
from finetune.checkpoint.reading import load_checkpoint_model, open_checkpoint
from finetune.errors import CheckpointError, ConfigError
from finetune.export.command import export
from finetune.inference.command import generate
from finetune.serving.command import _parse as parse_serve
from finetune.wrapped_model import load_base
from run_helpers import checkpoint_content

RATE = 24000
CODES = torch.randint(60, (1, 17, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def finetuned(untrained_run, tmp_path):
    """A run of moshi-finetune, which writes lora.safetensors and config.json, nothing else."""
    folder = tmp_path / "finetuned" / "checkpoints" / "checkpoint_000100" / "consolidated"
    shutil.copytree(checkpoint_content(untrained_run("lora")), folder)
    (folder / "training.json").unlink()
    return tmp_path / "finetuned"


@pytest.fixture
def user(tmp_path):
    """A second of noise and its words."""
    path = tmp_path / "voices" / "user.wav"
    path.parent.mkdir()
    samples = 0.1 * np.random.default_rng(0).standard_normal((2, 3 * RATE)).astype(np.float32)
    sphn.write_wav(str(path), samples, RATE)
    path.with_suffix(".json").write_text(json.dumps({"alignments": [["hello", [0.2, 0.4], "SPEAKER_MAIN"]]}))
    return path


def logits(model):
    with torch.no_grad():
        output = model.eval()(CODES)
    return torch.cat([output.text_logits.flatten(), output.logits.nan_to_num().flatten()])


def base_logits(base):
    info = find_model_files(ModelPaths(hf_repo_id=str(base)))
    return logits(load_base(info, device="cpu", dtype=torch.float32))


def loaded(path, **options):
    return logits(load_checkpoint_model(path, dtype=torch.float32, **options))


def test_a_base_model_can_be_talked_to(command, tiny_base, user, tmp_path):
    for name, options in (("a", ("--base", tiny_base)), ("b", ("--checkpoint", tiny_base))):
        status, output, errors = command(generate, user, tmp_path / f"{name}.wav", *options)
        assert (status, errors) == (0, [])
        assert f"model: base model {tiny_base}, no TTT layers" in output
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert parse_serve(["--base", str(tiny_base)]).checkpoint == str(tiny_base)
    assert torch.equal(loaded(tiny_base), base_logits(tiny_base))
    options = ("--base", tiny_base, "--save-memory", tmp_path / "memory.safetensors")
    status, _, errors = command(generate, user, tmp_path / "c.wav", *options)
    assert status == 2 and "--save-memory: " in errors[0] and "has no TTT layers" in errors[0]


def test_adapters_of_moshi_finetune_can_be_talked_to(
    command, finetuned, untrained_run, tiny_base, user, tmp_path
):
    options = ("--checkpoint", finetuned, "--base", tiny_base)
    status, output, errors = command(generate, user, tmp_path / "a.wav", *options)
    assert (status, errors) == (0, []) and "(step 100), no TTT layers" in output
    assert command(generate, user, tmp_path / "b.wav", "--checkpoint", untrained_run("lora"))[0] == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_full_weights_of_moshi_finetune_are_the_model(untrained_run, tiny_base, tmp_path):
    shutil.copytree(checkpoint_content(untrained_run("full")), tmp_path / "full")
    (tmp_path / "full" / "training.json").unlink()
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    merged = config | {"lora": True, "lora_rank": 4, "lora_scaling": 2.0}  # as it writes merged adapters
    (tmp_path / "full" / "config.json").write_text(json.dumps(merged))
    assert torch.equal(loaded(tmp_path / "full", base=str(tiny_base)), loaded(untrained_run("full")))


def test_what_names_no_base_model_needs_one(command, finetuned, tiny_base, user, tmp_path):
    for arguments, message in (
        (("--checkpoint", finetuned), "names no base model"),
        ((), "--checkpoint: give a trained model, or --base alone"),
        (("--checkpoint", tiny_base, "--base", "somebody/else"), "is a base model itself; leave out --base"),
    ):
        status, _, errors = command(generate, user, tmp_path / "out.wav", *arguments)
        assert status == 2 and len(errors) == 1 and message in errors[0]


def test_a_base_model_without_a_context_cannot_talk(command, tiny_base, user, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"context": None}))
    status, _, errors = command(generate, user, tmp_path / "out.wav", "--base", base)
    assert status == 2 and "its configuration has no context, so it cannot stream" in errors[0]


def test_a_checkpoint_with_ttt_is_not_taken_for_one_without(untrained_run, tiny_base, tmp_path):
    shutil.copytree(checkpoint_content(untrained_run("lora_ttt")), tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json is missing, which says how TTT was trained"):
        open_checkpoint(tmp_path / "checkpoint", base=str(tiny_base))


def test_where_training_starts_is_measured_as_what_it_led_to(capsys, finetuned, tiny_base, user, tmp_path):
    results = {}
    for name, options in (
        ("base", ("--base", tiny_base)),
        ("finetuned", ("--checkpoint", finetuned, "--base", tiny_base)),
    ):
        arguments = ["long-context", *options, "--data", user.parent, "--chunk-frames", 32]
        arguments += ["--at", "20", "--half-width", 10, "--resamples", 10, "--out", tmp_path / name]
        status, _, errors = run_evaluate(capsys, *arguments)
        assert (status, errors) == (0, [])
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert results["base"]["model"]["base_model"] == results["finetuned"]["model"]["base_model"]
    assert results["base"]["scores"] != results["finetuned"]["scores"]


def test_both_can_be_exported(command, finetuned, tiny_base, tmp_path):
    def run(out, *options):
        status, _, errors = command(export, "--out", tmp_path / out, *options)
        assert (status, errors) == (0, [])
        return tmp_path / out

    expected = loaded(finetuned, base=str(tiny_base))
    source = ("--checkpoint", finetuned, "--base-model", tiny_base)
    out = run("adapters", *source)
    assert torch.equal(loaded(out), expected)
    assert "fine-tuned with moshi-finetune: LoRA adapters." in (out / "README.md").read_text()
    torch.testing.assert_close(
        loaded(run("merged", *source, "--merged", "--dtype", "float32")), expected, rtol=0, atol=1e-4
    )
    out = run("base", "--base-model", tiny_base, "--merged", "--dtype", "float32")
    assert torch.equal(loaded(out), base_logits(tiny_base))
    assert "in which nothing was trained" in (out / "README.md").read_text()


def test_a_base_model_has_nothing_to_export_but_merged(tiny_base, tmp_path):
    with pytest.raises(ConfigError, match="is a base model; of that only --merged makes an export"):
        export(["--base-model", str(tiny_base), "--out", str(tmp_path / "out")])
