"""Resuming: what is restored, what may change in between, which checkpoint is used, what stays of the old."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from finetune import checkpointing
from finetune.checkpoint.integrity import content_files, describe_file
from finetune.checkpoint.layout import list_checkpoints
from finetune.checkpoint.reading import load_checkpoint_model
from finetune.checkpoint.resume_check import find_resume_point
from finetune.errors import CheckpointError, ConfigError
from finetune.training import carried_memory
from finetune.training import run as run_module
from finetune.training.run import run_training
from run_helpers import MODES, command_line, read_metrics, run_args, run_values, saved_weights, write_yaml

SETTINGS = {"duration_sec": 1.6, "batch_size": 1, "max_steps": 6, "ckpt_freq": 2, "num_ckpt_keep": None}


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """A run of six steps with a checkpoint every two, not to be written to."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_training(run_args(demo, run_dir, "lora_ttt", **SETTINGS))
    return run_dir


@pytest.fixture
def interrupted(whole, tmp_path):
    """A copy of that run as it was after four steps and something more."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint_000006")
    return run_dir


@pytest.fixture
def logs(monkeypatch, caplog):
    monkeypatch.setattr(
        run_module, "set_up_logging", lambda: logging.getLogger("finetune").setLevel(logging.INFO)
    )
    return lambda: [record.getMessage() for record in caplog.records]


def resume(demo, run_dir, mode="lora_ttt", **changes):
    run_training(run_args(demo, run_dir, mode, **(SETTINGS | {"resume": "auto"} | changes)))


def assert_same_weights(a: Path, b: Path, step: int = 6) -> None:
    first, second = saved_weights(a, step), saved_weights(b, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_in_its_directory_as_if_nothing_had_happened(whole, interrupted, demo):
    resume(demo, interrupted)
    assert_same_weights(whole, interrupted)
    for a, b in zip(read_metrics(whole, "train"), read_metrics(interrupted, "train"), strict=True):
        assert (a["step"], a["loss"], a["ttt_delta"]) == (b["step"], b["loss"], b["ttt_delta"])


def test_a_resume_that_forgets_the_last_keys_is_another_run(whole, interrupted, demo, monkeypatch):
    """What makes the test above one of carried keys: the checkpoint lies in the middle of a recording."""
    named_tensors = carried_memory._named_tensors

    def without_heard(carry):
        return ((name, tensor) for name, tensor in named_tensors(carry) if not name.startswith("heard"))

    point = find_resume_point(run_args(demo, interrupted, **(SETTINGS | {"resume": "auto"})))
    saved = FileSystemReader(point.state_dir).read_metadata().state_dict_metadata
    assert any(".heard." in name for name in saved)
    monkeypatch.setattr(carried_memory, "_named_tensors", without_heard)
    resume(demo, interrupted)
    first, second = saved_weights(whole, 6), saved_weights(interrupted, 6)
    assert not all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("mode", "persistent"), [("full_ttt", True), ("lora", True), ("lora_ttt", False), ("ttt", True)]
)
def test_every_mode_resumes_bit_for_bit(demo, tmp_path, mode, persistent):
    changes = {}
    if "ttt" in MODES[mode]:
        changes["ttt"] = MODES[mode]["ttt"] | {"persistent_states": persistent}
    settings = SETTINGS | {"max_steps": 4, "num_microbatches": 2, "param_dtype": "bfloat16"} | changes
    run_training(run_args(demo, tmp_path / "a", mode, **settings))
    source = tmp_path / "a" / "checkpoints" / "checkpoint_000002"
    run_training(run_args(demo, tmp_path / "b", mode, **(settings | {"resume": str(source)})))
    assert_same_weights(tmp_path / "a", tmp_path / "b", 4)
    assert len(list_checkpoints(tmp_path / "a" / "checkpoints")) == 2


def test_background_checkpoints_hold_the_same(whole, demo, tmp_path):
    run_training(run_args(demo, tmp_path / "run", **(SETTINGS | {"ckpt_async": True})))
    for step in (2, 4, 6):
        assert_same_weights(whole, tmp_path / "run", step)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint_000006")
    resume(demo, tmp_path / "run", ckpt_async=True)
    assert_same_weights(whole, tmp_path / "run")


def test_records_of_lost_steps_are_kept_aside(interrupted, demo):
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    resume(demo, interrupted)
    assert [record["step"] for record in read_metrics(interrupted, "train")] == [1, 2, 3, 4, 5, 6]
    abandoned = (interrupted / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in abandoned[:2]] == [5, 6] and len(abandoned) == 3


def test_auto_starts_afresh_where_there_is_no_checkpoint(demo, tmp_path, logs):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("of a run that was killed early\n")
    resume(demo, tmp_path / "run", max_steps=1, ckpt_freq=0)
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1]
    (backup,) = tmp_path.glob("run.bak-*")
    assert (backup / "metrics.jsonl").read_text() == "of a run that was killed early\n"


def test_a_complete_run_says_so_and_changes_nothing(whole, demo, tmp_path, logs):
    shutil.copytree(whole, tmp_path / "run")
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    resume(demo, tmp_path / "run")
    assert any("is complete: step 6 of 6" in line for line in logs())
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


def _flip_bit(folder):
    path = next((folder / "state").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(folder):
    path = next((folder / "state").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def _replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "bit flipped": _flip_bit,
    "truncated": _truncate,
    "file lost": lambda folder: (folder / "consolidated" / "ttt.safetensors").unlink(),
    "export changed": lambda folder: (folder / "consolidated" / "config.json").write_text("{}"),
    "not sealed": lambda folder: (folder / "DONE.json").unlink(),
    "sizes of text": lambda folder: (folder / "DONE.json").write_text(
        json.dumps({"files": {"resume.json": {"size": "big"}}})
    ),
    "a pipe": lambda folder: _replace_by_pipe(folder / "resume.json"),
    "seal damaged": lambda folder: (folder / "DONE.json").write_text('{"files": {"a": 1}}'),
    "metadata lost": lambda folder: (folder / "state" / ".metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(interrupted, demo, damage, caplog):
    DAMAGES[damage](interrupted / "checkpoints" / "checkpoint_000004")
    point = find_resume_point(run_args(demo, interrupted, **(SETTINGS | {"resume": "auto"})))
    assert point.step == 2
    assert "checkpoint_000004 cannot be used: " in caplog.text


REMOVED = object()


def _rewrite_facts(folder, key, value):
    """Change a key of resume.json and seal the checkpoint again, as somebody else could."""
    facts = json.loads((folder / "resume.json").read_text())
    *parents, leaf = key.split(".")
    section = facts
    for parent in parents:
        section = section[parent]
    if value is REMOVED:
        del section[leaf]
    else:
        section[leaf] = value
    (folder / "resume.json").write_text(json.dumps(facts))
    files = {name: describe_file(folder / name) for name in content_files(folder)}
    (folder / "DONE.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(
            (key, REMOVED, f"{key} is missing")
            for key in ("step", "num_samples", "best_eval", "memory", "args")
        ),
        *((key, REMOVED, f"{key} is missing") for key in ("global_batch", "data", "base_fingerprint")),
        ("data.num_recordings", REMOVED, "data.num_recordings is missing"),
        ("step", "4", "step: '4' is not allowed, must be a valid integer"),
        ("step", 3, "step: 3 is not that of its folder"),
        ("num_samples", -1, "num_samples: -1 is not allowed, must be greater than or equal to 0"),
        ("best_eval", {"step": 4}, "best_eval.loss is missing"),
        ("memory", {"x": [0, 0]}, "memory.x"),
        ("memory", {"0": [0]}, "memory.0: [0] is not allowed"),
        ("args", [], "args: [] is not allowed"),
        ("args.ttt", 3, "args.ttt: 3 is not a section"),
        ("args.moshi_paths", {}, "args.moshi_paths.moshi_path is missing"),
        ("frozen", "all", "frozen: 'all' is not allowed"),
        ("base_fingerprint", 7, "base_fingerprint: 7 is not allowed, must be a valid string"),
    ],
)
def test_a_resume_json_that_cannot_be_is_named_and_the_one_before_used(
    interrupted, demo, caplog, key, value, message
):
    _rewrite_facts(interrupted / "checkpoints" / "checkpoint_000004", key, value)
    point = find_resume_point(run_args(demo, interrupted, **(SETTINGS | {"resume": "auto"})))
    assert point.step == 2
    assert f"resume.json: {message}" in caplog.text


def test_memories_of_another_place_are_one_line(interrupted, demo):
    folder = interrupted / "checkpoints" / "checkpoint_000004"
    facts = json.loads((folder / "resume.json").read_text())
    moved = {lane: [recording, frame + 16] for lane, (recording, frame) in facts["memory"].items()}
    _rewrite_facts(folder, "memory", moved)
    with pytest.raises(CheckpointError, match="the memory of row 0 is not of this place in the data"):
        resume(demo, interrupted)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(whole, interrupted, demo, logs):
    _flip_bit(interrupted / "checkpoints" / "checkpoint_000004")
    resume(demo, interrupted)
    lines = logs()
    assert any("checkpoint_000004 cannot be used: state/" in line for line in lines)
    assert any("Resumed from" in line and "checkpoint_000002" in line for line in lines)
    assert_same_weights(whole, interrupted)
    assert list((interrupted / "checkpoints").glob("checkpoint_000004.bak-*"))


def test_when_all_are_damaged_nothing_is_touched(interrupted, demo):
    for folder in list_checkpoints(interrupted / "checkpoints"):
        _flip_bit(folder)
    before = sorted(path for path in interrupted.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact \(state/.* has other content"):
        resume(demo, interrupted)
    assert sorted(path for path in interrupted.rglob("*")) == before


def test_the_hint_of_the_newest_is_not_trusted(whole, interrupted, demo):
    (interrupted / "checkpoints" / "latest").write_text("checkpoint_000002\n")
    resume(demo, interrupted)
    assert len(read_metrics(interrupted, "train")) == 6
    assert not list((interrupted / "checkpoints").glob("*.bak-*"))
    assert (interrupted / "checkpoints" / "latest").read_text() == "checkpoint_000006\n"


def test_weights_without_a_training_state_are_refused(interrupted, demo):
    for folder in list_checkpoints(interrupted / "checkpoints"):
        shutil.rmtree(folder / "state")
    with pytest.raises(CheckpointError, match="it has no training state, only weights"):
        resume(demo, interrupted)


def test_changed_settings_are_reported_key_by_key(interrupted, demo, logs):
    resume(demo, interrupted, optim={"lr": 5e-4}, max_norm=2.0, max_steps=8, log_freq=2)
    changed = [line for line in logs() if line.startswith("Changed since step 4: ")]
    assert changed == [
        "Changed since step 4: log_freq 1 -> 2",
        "Changed since step 4: max_norm 1.0 -> 2.0",
        "Changed since step 4: max_steps 6 -> 8",
        "Changed since step 4: optim.lr 0.001 -> 0.0005",
    ]
    assert "max_steps: 6" in (interrupted / "args.until_step_4.yaml").read_text()
    assert "max_steps: 8" in (interrupted / "args.yaml").read_text()
    assert read_metrics(interrupted, "train")[-1]["step"] == 8


TTT = MODES["lora_ttt"]["ttt"]
MEANINGLESS = {
    "lora.rank": {"lora": {"enable": True, "rank": 8}},
    "ttt.layers": {"ttt": TTT | {"layers": "1,2"}},
    "ttt.mini_batch_size": {"ttt": TTT | {"mini_batch_size": 8}},
    "ttt.persistent_states": {"ttt": TTT | {"persistent_states": False}},
    "duration_sec": {"duration_sec": 3.2},
    "seed": {"seed": 1},
    "batch_size: a step has 2 chunks": {"batch_size": 2},
}


@pytest.mark.parametrize("key", MEANINGLESS)
def test_changes_that_make_going_on_meaningless_are_refused(interrupted, demo, key):
    before = sorted(path for path in interrupted.rglob("*"))
    with pytest.raises(ConfigError, match=f"^{key}"):
        resume(demo, interrupted, **MEANINGLESS[key])
    assert sorted(path for path in interrupted.rglob("*")) == before


def test_other_recordings_are_refused(interrupted, demo):
    data = {"train_data": str(demo.eval_jsonl), "shuffle": True, "num_workers": 0}
    with pytest.raises(ConfigError, match=r"data.train_data: holds other recordings .*\(1 instead of 2"):
        resume(demo, interrupted, data=data)


@pytest.mark.parametrize("name", ["transformer.layers.0.norm1.alpha", "text_emb.weight"])
def test_another_base_model_is_refused(interrupted, demo, tmp_path, name):
    base = tmp_path / "base"
    shutil.copytree(demo.model_dir, base)
    tensors = load_file(base / "model.safetensors")
    tensors[name] += 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ConfigError, match="moshi_paths: holds other weights"):
        resume(demo, interrupted, moshi_paths={"hf_repo_id": str(base)})


def test_an_existing_run_directory_says_how_to_go_on(interrupted, demo, tmp_path, monkeypatch, capsys):
    config = write_yaml(tmp_path / "config.yaml", run_values(demo, interrupted, **SETTINGS))
    assert command_line(monkeypatch, "--config", str(config)) == 2
    assert "go on from its step 4 with --resume auto" in capsys.readouterr().err


def test_a_run_needs_no_configuration_to_go_on(whole, interrupted, tmp_path, monkeypatch, capsys):
    moved = interrupted.rename(tmp_path / "moved")
    assert command_line(monkeypatch, "--resume", str(moved), "--log_freq", "2") == 0
    assert_same_weights(whole, moved)
    assert not interrupted.exists()
    assert command_line(monkeypatch, "--resume", str(tmp_path / "nowhere")) == 2
    assert "nowhere: does not exist; give the run_dir" in capsys.readouterr().err


def test_a_path_without_checkpoints_is_one_line(demo, tmp_path):
    with pytest.raises(CheckpointError, match=r"resume: .*nowhere has no checkpoint"):
        resume(demo, tmp_path / "run", resume=str(tmp_path / "nowhere"))


def test_an_older_checkpoint_can_be_branched_into_another_run(whole, demo, tmp_path):
    before = sorted(path for path in whole.rglob("*"))
    source = whole / "checkpoints" / "checkpoint_000002"
    resume(demo, tmp_path / "branch", resume=str(source))
    assert_same_weights(whole, tmp_path / "branch")
    assert [record["step"] for record in read_metrics(tmp_path / "branch", "train")] == [3, 4, 5, 6]
    assert sorted(path for path in whole.rglob("*")) == before


def test_going_back_in_the_same_run_renames_what_came_later(whole, demo, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    resume(demo, "", resume=str(tmp_path / "run" / "checkpoints" / "checkpoint_000002"))
    assert_same_weights(whole, tmp_path / "run")
    names = {path.name.partition(".bak")[0] for path in (tmp_path / "run" / "checkpoints").glob("*.bak-*")}
    assert names == {"checkpoint_000004", "checkpoint_000006"}


def test_the_best_checkpoint_and_the_newest_are_kept(demo, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    monkeypatch.setattr("finetune.training.trainer.evaluate", lambda *args, **kwargs: {"loss": next(losses)})
    monkeypatch.setattr("finetune.training.trainer.eval_line", lambda *args: "")
    settings = {"do_eval": True, "eval_freq": 1, "ckpt_freq": 1, "max_steps": 5, "num_ckpt_keep": 2}
    run_training(run_args(demo, tmp_path / "run", "ttt", **(SETTINGS | settings)))
    names = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names == ["checkpoint_000002", "checkpoint_000004", "checkpoint_000005"]
    facts = json.loads((tmp_path / "run" / "checkpoints" / names[-1] / "resume.json").read_text())
    assert facts["best_eval"] == {"step": 2, "loss": 1.0} and facts["eval_loss"] == 5.0


def test_the_last_good_checkpoint_is_never_deleted_first(demo, tmp_path, monkeypatch):
    original = checkpointing.write_consolidated

    def fail_at_step_2(*args, step, **kwargs):
        if step == 2:
            raise OSError(28, "No space left on device")
        original(*args, step=step, **kwargs)

    monkeypatch.setattr(checkpointing, "write_consolidated", fail_at_step_2)
    settings = {"ckpt_freq": 1, "num_ckpt_keep": 1, "max_steps": 3}
    with pytest.raises(CheckpointError, match="No space left on device"):
        run_training(run_args(demo, tmp_path / "a", "ttt", **(SETTINGS | settings)))
    assert [path.name for path in list_checkpoints(tmp_path / "a" / "checkpoints")] == ["checkpoint_000001"]
    run_training(run_args(demo, tmp_path / "b", "ttt", ckpt_on_error="continue", **(SETTINGS | settings)))
    assert [path.name for path in list_checkpoints(tmp_path / "b" / "checkpoints")] == ["checkpoint_000003"]
    assert len(read_metrics(tmp_path / "b", "train")) == 3


def test_adapters_on_full_weights_keep_these_as_their_base(demo, tmp_path):
    run_training(run_args(demo, tmp_path / "full", "full", **(SETTINGS | {"max_steps": 2})))
    settings = SETTINGS | {"init_from": str(tmp_path / "full"), "max_steps": 2, "do_eval": True}
    run_training(run_args(demo, tmp_path / "lora", "lora", **settings))
    training = json.loads(
        (tmp_path / "lora/checkpoints/checkpoint_000002/consolidated/training.json").read_text()
    )
    assert training["moshi_paths"]["moshi_path"].startswith(str(tmp_path / "full"))
    full = saved_weights(tmp_path / "full", 2)
    model = load_checkpoint_model(tmp_path / "lora", dtype=torch.float32)
    assert torch.equal(model.text_linear.frozen_W.weight, full["text_linear.weight"])


def test_hidden_remains_of_a_killed_save_do_no_harm(whole, interrupted, demo):
    remains = interrupted / "checkpoints" / ".tmp-checkpoint_000006"
    shutil.copytree(interrupted / "checkpoints" / "checkpoint_000004", remains)
    (remains / "DONE.json").unlink()
    resume(demo, interrupted)
    assert_same_weights(whole, interrupted)
    assert not remains.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_checkpoint_folder_that_may_not_be_written_is_one_line(interrupted, demo):
    (interrupted / "checkpoints").chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        resume(demo, interrupted)
