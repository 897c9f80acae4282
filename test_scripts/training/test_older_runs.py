"""Runs from before there were key_shift, tied_start and base_lr_scale keep their meaning."""

import json
import shutil

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from finetune.base_model.locate import find_model_files
from finetune.checkpoint.description import CheckpointDescription
from finetune.checkpoint.integrity import content_files, describe_file
from finetune.checkpoint.layout import DONE_FILE, list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model, warm_start
from finetune.config_io import load_run_args, read_yaml
from finetune.errors import CheckpointError, ConfigError
from finetune.training.run import run_training
from finetune.wrapped_model import build_model
from moshi_ttt.config import BEFORE_THERE_WERE_KEYS
from moshi_ttt.hybrid_model import ttt_layers
from run_helpers import TTT, command_line, final_folder, run_args, run_values, saved_weights, write_yaml

BEFORE = dict(BEFORE_THERE_WERE_KEYS)
SETTINGS = {
    "duration_sec": 1.6,
    "batch_size": 1,
    "max_steps": 4,
    "ckpt_freq": 2,
    "ttt": TTT | {"base_lr": 0.5} | BEFORE,
}


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """A run of four steps that says what older ones mean, not to be written to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_training(run_args(demo, run_dir, **SETTINGS))
    return run_dir


@pytest.fixture
def older(whole, tmp_path):
    """A copy of it with its last two steps to do, as an earlier version would have written it."""
    run_dir = tmp_path / "older"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint_000004")
    (folder,) = list_checkpoints(run_dir / "checkpoints")
    consolidated = folder / "consolidated"
    for path in (consolidated / "config.json", consolidated / "training.json", folder / "resume.json"):
        values = json.loads(path.read_text())
        without_the_keys(values["args"] if path.name == "resume.json" else values)
        path.write_text(json.dumps(values))
    sealed = {name: describe_file(folder / name) for name in content_files(folder)}
    (folder / DONE_FILE).write_text(json.dumps({"files": sealed}))
    values = read_yaml(run_dir / "args.yaml")
    without_the_keys(values)
    write_yaml(run_dir / "args.yaml", values)
    assert not any(key in path.read_text() for path in run_dir.rglob("*.[jy]*") for key in BEFORE)
    return run_dir


def without_the_keys(values):
    for key in BEFORE:
        del values["ttt"][key]


def meaning_of(ttt):
    return {key: getattr(ttt, key) for key in BEFORE}


def assert_ends_as(run_dir, whole):
    first, second = saved_weights(run_dir, 4), saved_weights(whole, 4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_its_descriptions_and_its_configuration_mean_what_they_meant(older, whole):
    description = CheckpointDescription.read(final_folder(older))
    assert meaning_of(description.ttt) == BEFORE and description.ttt.base_lr == 0.5
    args = load_run_args(older)
    assert meaning_of(args.ttt) == BEFORE and args.ttt.base_lr == 0.5
    now = CheckpointDescription.read(whole / "checkpoints" / "checkpoint_000002" / "consolidated")
    assert description.ttt == now.ttt


def test_its_model_is_built_as_it_was_trained(older):
    for layer in ttt_layers(load_checkpoint_model(older, dtype=torch.float32)).values():
        assert meaning_of(layer.config) == BEFORE
        assert layer.config.inner_rate_unit == 1 / layer.config.head_dim / layer.config.mini_batch_size


def test_one_of_two_descriptions_cannot_have_a_key_shift_alone(older):
    path = final_folder(older) / "config.json"
    values = json.loads(path.read_text())
    values["ttt"]["key_shift"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"ttt\.key_shift is 1 in config\.json but 0 in training\.json"):
        CheckpointDescription.read(path.parent)


def test_another_run_that_starts_from_it_says_what_differs(older, demo, tmp_path):
    args = run_args(demo, tmp_path / "new", init_from=str(older))
    model = build_model(args, find_model_files(args.moshi_paths), device=torch.device("cpu"))
    lines = warm_start(model, older, args).lines
    assert "Differs: ttt.key_shift is 1, the checkpoint had 0." in lines
    assert "Differs: ttt.base_lr_scale is share, the checkpoint had published." in lines


def test_it_goes_on_by_its_directory_alone(older, whole, monkeypatch):
    assert command_line(monkeypatch, "--resume", older) == 0
    assert_ends_as(older, whole)
    assert meaning_of(load_run_args(older).ttt) == BEFORE


def test_it_goes_on_with_a_configuration_that_says_what_it_means(older, whole, demo):
    """Its memory, in the middle of a recording, has no keys that were heard before."""
    state_dir = older / "checkpoints" / "checkpoint_000002" / "state"
    saved = FileSystemReader(state_dir).read_metadata().state_dict_metadata
    assert any(name.startswith("memory.") for name in saved) and not any("heard" in name for name in saved)
    run_training(run_args(demo, older, **SETTINGS, resume="auto"))
    assert_ends_as(older, whole)
    # The configuration is another file, but says nothing new.
    assert read_yaml(older / "args.yaml")["ttt"].keys() >= BEFORE.keys()


@pytest.mark.parametrize(
    ("ttt", "keys"),
    [
        ({}, "ttt.base_lr_scale, ttt.key_shift, ttt.tied_start"),
        ({"base_lr": 0.5}, "ttt.key_shift, ttt.tied_start"),
        (BEFORE | {"base_lr": 0.5, "key_shift": 1}, "ttt.key_shift"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(older, demo, ttt, keys):
    before = sorted(older.rglob("*"))
    with pytest.raises(ConfigError) as error:
        run_training(run_args(demo, older, **(SETTINGS | {"ttt": TTT | ttt, "resume": "auto"})))
    line = str(error.value)
    assert line.startswith(f"{keys}: the run to resume (") and "\n" not in line
    meant = {"ttt.base_lr_scale": "'published'", "ttt.key_shift": "0", "ttt.tied_start": "false"}
    there = ", ".join(f"{key}: {meant[key]}" for key in keys.split(", "))
    assert f"is older than these keys and means {there}; give these values" in line
    assert sorted(older.rglob("*")) == before


def test_the_refusal_is_one_line_of_the_command(older, demo, tmp_path, monkeypatch, capsys):
    values = run_values(demo, older, **(SETTINGS | {"ttt": TTT}))
    path = write_yaml(tmp_path / "config.yaml", values)
    assert command_line(monkeypatch, "--config", path, "--resume", "auto") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "older than these keys" in line]
    assert "ttt.key_shift: 0" in line
