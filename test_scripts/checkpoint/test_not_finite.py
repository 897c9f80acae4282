"""Weights and training states with NaN or infinity are refused by name, wherever they come from."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import CheckpointError
from finetune.training import train_state
from finetune.training.run import run_training
from run_helpers import checkpoint_content, run_args, write_untrained_run

SETTINGS = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 1}


def spoil(path, name, value=math.nan):
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("mimi.safetensors", "encoder.model.0.conv.conv.weight"),
        ("model.safetensors", "transformer.layers.0.norm1.alpha"),
        ("model.safetensors", "depformer_emb.0.weight"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_base_model_or_codec_that_is_not_finite_is_refused(demo, tmp_path, file, name, value):
    base = shutil.copytree(demo.model_dir, tmp_path / "base")
    names = load_file(base / file).keys()
    name = next(other for other in names if other.endswith(name.partition(".")[2]))
    spoil(base / file, name, value)
    with pytest.raises(CheckpointError, match=rf"{file}: .* holds values that are not finite numbers"):
        run_training(run_args(demo, tmp_path / "run", moshi_paths={"hf_repo_id": str(base)}, **SETTINGS))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["lora.safetensors", "ttt.safetensors"])
def test_adapters_to_start_from_that_are_not_finite_are_refused(demo, tmp_path, file):
    content = checkpoint_content(write_untrained_run(tmp_path / "first", "lora_ttt", demo.model_dir))
    spoil(content / file, sorted(load_file(content / file))[0])
    with pytest.raises(CheckpointError, match=r"init_from: .* holds values that are not finite numbers"):
        run_training(run_args(demo, tmp_path / "run", init_from=str(tmp_path / "first"), **SETTINGS))


@pytest.mark.parametrize("kind", ["model.", "optimizer.", "memory."])
def test_a_training_state_that_is_not_finite_is_refused(demo, tmp_path, monkeypatch, kind):
    original = train_state.collect_state

    def collect_state(*args, **options):
        tensors = original(*args, **options)
        name = next(name for name in tensors if name.startswith(kind) and tensors[name].dim())
        return tensors | {name: torch.full_like(tensors[name], math.nan)}

    with monkeypatch.context() as patch:
        patch.setattr(train_state, "collect_state", collect_state)
        run_training(run_args(demo, tmp_path / "run", **SETTINGS))
    with pytest.raises(CheckpointError, match=rf": {kind}.* holds values that are not finite numbers"):
        run_training(run_args(demo, tmp_path / "run", **(SETTINGS | {"max_steps": 2, "resume": "auto"})))
