"""Inner-loop trajectories as files, plots and a command."""

import json
import math

import pytest
import torch

from finetune.args import TTTArgs
from finetune.commands import run_command
from finetune.errors import ConfigError, DataError, StateError
from finetune.evaluation.command import evaluate
from finetune.monitoring.inner_loop_log import InnerLoopLog, read_inner_losses
from finetune.monitoring.plots import _running_mean, plot_trajectories
from finetune.monitoring.trajectories import load_trajectories, save_trajectories, summarise, summary_lines

# Files.


def random_losses(num_frames=600):
    torch.manual_seed(0)
    after = torch.rand(num_frames) + 1
    losses = torch.stack([after + 2, after + 0.5, after])
    losses[:, 5] = math.nan
    return {3: losses, 11: losses + 1}


def test_files_give_back_what_was_saved(tmp_path):
    path, losses = tmp_path / "a.safetensors", random_losses()
    save_trajectories(
        path, {11: losses[11].double(), 3: losses[3]}, facts={"checkpoint": "runs/a", "seconds": 48.0}
    )
    loaded = load_trajectories(path)
    assert list(loaded.losses) == [3, 11] and loaded.facts == {"checkpoint": "runs/a", "seconds": 48.0}
    assert all(torch.equal(loaded.losses[i].nan_to_num(-1), losses[i].nan_to_num(-1)) for i in losses)
    save_trajectories(path, losses, facts={})  # replaces its own kind


def test_files_that_are_no_trajectories_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a tensor")
    with pytest.raises(StateError, match="cannot be read as safetensors"):
        load_trajectories(tmp_path / "text.safetensors")
    with pytest.raises(StateError, match="does not exist"):
        load_trajectories(tmp_path / "none.safetensors")
    save_trajectories(tmp_path / "flat.safetensors", {1: torch.zeros(5)}, facts={})
    with pytest.raises(StateError, match=r"layer\.1 \[5\] is no trajectory"):
        load_trajectories(tmp_path / "flat.safetensors")


def write_record(run_dir, steps):
    run_dir.mkdir(exist_ok=True)
    log = InnerLoopLog(run_dir, TTTArgs(enable=True, log_inner_loop_losses=True, inner_loop_log_interval=10))
    for step in steps:
        log.write(step, {index: part + step for index, part in random_losses(48).items()})
    return run_dir / "inner_loop_losses.jsonl"


def test_a_record_of_a_run_is_read_by_its_step(tmp_path):
    path = write_record(tmp_path, [10, 20, 30])
    with path.open("a") as file:
        file.write('{"step": 40, "layers": {"3": [[1.0')  # cut off
    last, second = read_inner_losses(path), read_inner_losses(path, 20)
    assert (last.step, second.step) == (30, 20) and list(last.losses) == [3, 11]
    torch.testing.assert_close(last.losses[11], random_losses(48)[11] + 30, equal_nan=True)
    with pytest.raises(ConfigError, match=r"no record of step 40, only of 10, 20, 30\.$"):
        read_inner_losses(path, 40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no record yet"),
        ("hello\n", "line 1 is not a record"),
        ('{"step": 3, "layers": {"1": [[1.0], [2.0]]}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {"1": [[1.0], [2.0, 1.0], []]}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": 1\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {}}\n', "the record of step 3 is damaged"),
        ('{"step": 3, "layers": {"-1": [[3.0], [2.0], [1.0]]}}\n', "the record of step 3 is damaged"),
        (f'{{"step": {"9" * 5000}, "layers": {{}}}}\n', "line 1 is not a record"),
    ],
)
def test_damaged_records_are_named(tmp_path, content, message):
    path = tmp_path / "inner_loop_losses.jsonl"
    path.write_text(content)
    with pytest.raises((ConfigError, DataError), match=message):
        read_inner_losses(path)


# Plots and the command line.


def test_a_running_mean_leaves_out_nan():
    series = torch.tensor([1.0, 2, math.nan, 4, math.nan, math.nan, math.nan]).numpy()
    mean = _running_mean(series, 3)
    assert mean[:5].tolist() == [1.5, 1.5, 3, 4, 4] and all(map(math.isnan, mean[5:]))


def test_plots_of_short_long_and_empty_trajectories(tmp_path):
    for number, num_frames in enumerate((0, 1, 20, 3000)):
        losses = torch.rand(3, num_frames)
        (path,) = plot_trajectories({7: losses}, tmp_path / str(number), title="a")
        assert path.name == "inner_loss_layer_7.png" and path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("what", ["run", "jsonl", "safetensors"])
def test_the_command_prints_a_table_and_writes_plots_and_a_summary(tmp_path, capsys, what):
    run = tmp_path / "run"
    path = write_record(run, [10, 20])
    if what == "safetensors":
        path = run / "long.safetensors"
        save_trajectories(path, random_losses(), facts={"recording": "a.wav"})
    evaluate(["trajectories", str(run if what == "run" else path)])
    out = run / "trajectories" / ("long" if what == "safetensors" else "step_000020")
    names = {"summary.json", "inner_loss_layer_3.png", "inner_loss_layer_11.png"}
    assert {p.name for p in out.iterdir() if p.is_file()} == names
    summary = json.loads((out / "summary.json").read_text())
    assert summary["facts"] == ({"recording": "a.wav"} if what == "safetensors" else {"step": 20})
    assert summary["layers"]["3"]["share_ordered"] == 1 and summary["layers"]["3"]["num_excluded"] == 1
    assert summary["layers"]["11"]["gain_per_step"] == pytest.approx(0.5, rel=1e-5)
    printed = capsys.readouterr().out
    head, *rows = summary_lines({3: summarise(read_inner_losses(run / "inner_loop_losses.jsonl").losses[3])})
    assert head in printed and "100.00%" in printed
    if what != "safetensors":
        assert rows[0] in printed


def test_a_step_and_a_folder_can_be_chosen(tmp_path):
    write_record(tmp_path, [10, 20])
    evaluate(["trajectories", str(tmp_path), "--step", "10", "--out", str(tmp_path / "new" / "out")])
    assert json.loads((tmp_path / "new" / "out" / "summary.json").read_text())["facts"] == {"step": 10}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: PATH (see --help)."),
        (["{run}/empty"], "has no inner_loop_losses.jsonl; give a run that was trained with"),
        (["{run}/none.jsonl"], "none.jsonl: does not exist."),
        (["{run}/none.safetensors"], "none.safetensors: does not exist."),
        (["{run}", "--step", "7"], "has no record of step 7, only of 10."),
        (["{run}", "--step", "x"], "argument --step: invalid int value: 'x' (see --help)."),
        (["{run}/a.safetensors", "--step", "7"], "has no steps; leave it out."),
        (["{run}", "--out", "{run}/a.safetensors"], "is a file; give a folder."),
        (["{run}", "--out", ""], "an empty one is no path."),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, capsys, arguments, message):
    write_record(tmp_path, [10])
    (tmp_path / "empty").mkdir()
    save_trajectories(tmp_path / "a.safetensors", random_losses(), facts={})
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: evaluate(["trajectories", *(part.format(run=tmp_path) for part in arguments)]))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
