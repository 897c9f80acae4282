"""A base model at a revision of the Hub: it is loaded, recorded, and loaded again from a checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.args import ModelPaths, TrainArgs
from finetune.base_model.fingerprint import base_fingerprint
from finetune.base_model.locate import find_architecture, find_model_files, lm_config
from finetune.checkpoint.reading import load_checkpoint_model, open_checkpoint
from finetune.checkpointing import Checkpointer
from finetune.config_io import build_args
from finetune.errors import CheckpointError, ConfigError
from finetune.export.folder import export_checkpoint
from finetune.wrapped_model import build_model
from run_helpers import MODES, final_folder

REPOSITORY = "somebody/base"


@pytest.fixture
def commits(hub_cache, tiny_base, tmp_path):
    """A repository whose branch `old` holds the tiny base, and `main` other weights; the commits of both."""
    newer = tmp_path / "newer"
    shutil.copytree(tiny_base, newer)
    tensors = load_file(newer / "model.safetensors")
    save_file(
        {name: tensor + 0.01 if name == "text_linear.weight" else tensor for name, tensor in tensors.items()},
        newer / "model.safetensors",
    )
    return {
        "old": hub_cache(REPOSITORY, tiny_base, branch="old"),
        "main": hub_cache(REPOSITORY, newer, branch="main"),
    }


@pytest.fixture
def run_at_old(commits, tmp_path):
    """A checkpoint that was made on the branch `old`."""
    paths = {"hf_repo_id": REPOSITORY, "revision": "old"}
    values = MODES["lora_ttt"] | {"param_dtype": "float32", "moshi_paths": paths}
    args = build_args(TrainArgs, values | {"run_dir": str(tmp_path / "run")})
    info = find_model_files(args.moshi_paths)
    model = build_model(args, info, device=torch.device("cpu"))
    Checkpointer(tmp_path / "run", args, lm_config(info), base_fingerprint(info)).save(model, 1)
    return tmp_path / "run"


def test_all_files_and_the_architecture_are_those_of_the_revision(commits):
    for revision, commit in ((None, commits["main"]), ("old", commits["old"]), (commits["old"],) * 2):
        paths = ModelPaths(hf_repo_id=REPOSITORY, revision=revision)
        info = find_model_files(paths)
        for file in (info.moshi_weights, info.mimi_weights, info.tokenizer):
            assert file.parent.name == commit
        assert f"/{commit}/" in find_architecture(paths)[1]


def test_a_file_of_another_repository_is_not_asked_for_this_revision(commits, hub_cache, tiny_base):
    commit = hub_cache("somebody/codec", tiny_base)
    mimi = "hf://somebody/codec/mimi.safetensors"
    info = find_model_files(ModelPaths(hf_repo_id=REPOSITORY, revision="old", mimi_path=mimi))
    assert info.mimi_weights.parent.name == commit and info.moshi_weights.parent.name == commits["old"]


def test_a_checkpoint_records_it_and_is_loaded_on_it(run_at_old, commits, tiny_base):
    training = json.loads((final_folder(run_at_old) / "training.json").read_text())
    assert training["moshi_paths"]["revision"] == "old"
    assert open_checkpoint(run_at_old).model_paths.revision == "old"
    state = load_checkpoint_model(run_at_old, dtype=torch.float32).state_dict()
    expected = load_file(tiny_base / "model.safetensors")["text_linear.weight"]
    assert torch.equal(state["text_linear.frozen_W.weight"], expected.float())


def test_a_revision_that_moved_on_is_found_out(run_at_old, commits):
    path = final_folder(run_at_old) / "training.json"
    training = json.loads(path.read_text())
    training["moshi_paths"]["revision"] = commits["main"]
    path.write_text(json.dumps(training))
    with pytest.raises(CheckpointError, match="was trained on another base model than"):
        load_checkpoint_model(run_at_old)


def test_an_older_checkpoint_knows_none_and_takes_the_newest(run_at_old):
    path = final_folder(run_at_old) / "training.json"
    training = json.loads(path.read_text())
    del training["moshi_paths"]["revision"]
    path.write_text(json.dumps(training))
    assert open_checkpoint(run_at_old).model_paths.revision is None


def test_an_export_names_it(run_at_old, tmp_path):
    export_checkpoint(run_at_old, tmp_path / "export")
    training = json.loads((tmp_path / "export" / "training.json").read_text())
    assert (training["moshi_paths"]["hf_repo_id"], training["moshi_paths"]["revision"]) == (REPOSITORY, "old")


def test_a_folder_of_the_same_name_is_not_the_revision(run_at_old, commits, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path)
    args = build_args(
        TrainArgs,
        MODES["lora"]
        | {"run_dir": str(tmp_path / "second"), "moshi_paths": {"hf_repo_id": REPOSITORY, "revision": "old"}},
    )
    info = find_model_files(args.moshi_paths)
    model = build_model(args, info, device=torch.device("cpu"))
    Checkpointer(tmp_path / "second", args, lm_config(info), None).save(model, 1)
    assert open_checkpoint(tmp_path / "second").model_paths.revision == "old"


@pytest.mark.parametrize("look", [find_model_files, find_architecture])
def test_a_local_folder_has_none(look, tiny_base):
    with pytest.raises(CheckpointError) as error:
        look(ModelPaths(hf_repo_id=str(tiny_base), revision="v1"))
    expected = f"moshi_paths.revision: 'v1' is of a repository of the Hub, {tiny_base} is a folder"
    assert str(error.value) == f"{expected}; leave it out."
    with pytest.raises(CheckpointError, match=r"revision: 'v1' .* hf_repo_id is not set; leave it out"):
        look(ModelPaths(hf_repo_id=None, revision="v1", config_path=str(tiny_base / "config.json")))


@pytest.mark.parametrize("look", [find_model_files, find_architecture])
def test_one_that_cannot_be_reached_is_one_line(look, commits):
    with pytest.raises(CheckpointError) as error:
        look(ModelPaths(hf_repo_id=REPOSITORY, revision="nowhere"))
    assert f"'{REPOSITORY}' (revision nowhere) is neither" in str(error.value) and "\n" not in str(
        error.value
    )


def test_an_empty_one_is_one_line():
    with pytest.raises(ConfigError, match=r"moshi_paths\.revision: '' is not allowed"):
        build_args(TrainArgs, {"full_finetuning": True, "moshi_paths": {"revision": ""}})
