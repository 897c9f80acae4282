"""Models of the Moshi family that cannot be trained here: each is named, wherever somebody gives it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import ModelPaths
from finetune.base_model.locate import find_architecture, find_model_files
from finetune.data.encode import encode
from finetune.errors import CheckpointError
from finetune.training.command import train
from run_helpers import run_values, write_yaml

KINDS = {
    "quantised": (
        {"quantize": True},
        "quantize: true announces quantised weights, which can neither be trained",
    ),
    "text to speech": (
        {"n_q": 8, "dep_q": 8, "delays": [0, 0, *[1] * 7]},
        "n_q: 8 and dep_q: 8 with these delays is one voice that hears nobody",
    ),
    "odd voices": ({"n_q": 17, "delays": [0] * 18}, "n_q: 17 and dep_q: 8 are neither two voices of the"),
    "norm of a frame": ({"depformer_norm": "rms_norm_f32"}, "depformer_norm: rms_norm_f32 is a model whose"),
    "other text": ({"text_card_out": 5}, "text_card_out: 5 is a model that writes another text vocabulary"),
    "future": ({"causal": False}, "causal: false is a model that sees the future"),
}


def changed(base, folder, change):
    """A copy of a base model with another configuration."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_is_named_before_anything_is_built(tiny_base, tmp_path, kind):
    change, message = KINDS[kind]
    paths = ModelPaths(hf_repo_id=str(changed(tiny_base, tmp_path / "base", change)))
    for find in (find_model_files, find_architecture):
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}") as error:
            find(paths)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["quantised", "text to speech", "norm of a frame"])
def test_dry_run_encoding_and_training_name_the_kind_in_one_line(demo, tmp_path, command, kind):
    change, message = KINDS[kind]
    base = changed(demo.model_dir, tmp_path / "base", change)
    values = run_values(demo, tmp_path / "run", moshi_paths={"hf_repo_id": str(base)})
    config = write_yaml(tmp_path / "config.yaml", values)
    for main, *arguments in (
        (train, config, "--dry-run"),
        (train, config),
        (encode, "--config", config),
        (encode, demo.train_jsonl, "--base", base),
    ):
        status, _, errors = command(main, *arguments)
        assert status == 2 and len(errors) == 1 and message in errors[0]


def test_quantised_weights_are_named_whatever_the_configuration_says(tiny_base, tmp_path):
    base = changed(tiny_base, tmp_path / "base", {})
    tensors = load_file(base / "model.safetensors")
    name = "transformer.layers.0.self_attn.in_projs.0.weight"
    scales = tensors[name].abs().amax(1)
    tensors |= {name: torch.zeros_like(tensors[name], dtype=torch.int8), f"{name}_scb": scales}
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: holds quantised weights"):
        find_model_files(ModelPaths(hf_repo_id=str(base)))
