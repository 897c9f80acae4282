"""evaluate.py watch: each checkpoint once, in order, whatever is interrupted, resumed or deleted."""

import json
import shutil
from pathlib import Path

import pytest

from evaluation_helpers import run_evaluate
from finetune.errors import DataError
from finetune.evaluation import command as evaluation
from finetune.evaluation.watch import command as watch
from miniatures.duplex import write_bench

MEASUREMENT = ("long-context", "--data", "d", "--compare")
SCORES = {100: 0.5, 200: 0.2, 300: 0.4, 400: None}


class FakeMeasurement:
    """Stands in the place of a measurement: writes the score of a checkpoint's step."""

    def __init__(self):
        self.seen = []
        self.on_step = {}
        self.names = ["long-context"]

    def prepare(self, arguments):
        options = dict(zip(arguments[-4::2], arguments[-3::2], strict=True))
        assert tuple(arguments[:-4]) == MEASUREMENT

        def measure():
            checkpoint, folder = Path(options["--checkpoint"]), Path(options["--out"])
            step = int(checkpoint.name[-6:])
            self.seen.append(step)
            folder.mkdir(exist_ok=bool(self.names))
            self.on_step.pop(step, lambda _: None)(checkpoint)
            (folder / "results.json").write_text(json.dumps({"scores": {"a": {"b": SCORES[step]}, "n": 1}}))

        return measure


@pytest.fixture
def run_dir(tmp_path) -> Path:
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "args.yaml").write_text("max_steps: 300\n")
    return path


@pytest.fixture
def fake(monkeypatch):
    fake = FakeMeasurement()
    subcommands = [
        each._replace(run=lambda options: watch.run(options, prepare=fake.prepare, resumable=fake.names))
        if each.name == "watch"
        else each
        for each in evaluation.SUBCOMMANDS
    ]
    monkeypatch.setattr(evaluation, "SUBCOMMANDS", tuple(subcommands))
    return fake


@pytest.fixture
def command(capsys, run_dir, tmp_path):
    def run(*options, measurement=MEASUREMENT):
        arguments = ["watch", run_dir, "--out", tmp_path / "out", "--score", "scores.a.b", *options]
        return run_evaluate(capsys, *arguments, "--", *measurement)

    return run


def add_checkpoint(run_dir: Path, step: int, content: str = "1") -> Path:
    folder = run_dir / "checkpoints" / f"checkpoint_{step:06d}"
    folder.mkdir()
    (folder / "DONE.json").write_text(f'{{"files": {{"{step}": {content}}}}}')
    return folder


def record(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "watch.json").read_text())


def test_each_checkpoint_is_measured_once_as_it_appears_until_the_run_ends(
    command, fake, run_dir, tmp_path, monkeypatch
):
    add_checkpoint(run_dir, 100)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) % 2 == 0:
            add_checkpoint(run_dir, 100 * (1 + len(waits) // 2))

    monkeypatch.setattr(watch.time, "sleep", sleep)
    status, output, errors = command("--poll-sec", 7)
    assert (status, errors) == (0, []), output
    assert fake.seen == [100, 200, 300] and waits == [7] * 4
    found = record(tmp_path)
    assert [each["step"] for each in found["checkpoints"]] == [100, 200, 300]
    assert (found["best"]["step"], found["best"]["score"]) == (100, 0.5)
    assert "checkpoint_000100 best" in output and output.count("waiting for checkpoints") == 2
    assert command()[0] == 0 and fake.seen == [100, 200, 300]


def test_another_score_is_chosen_without_measuring_again(command, fake, run_dir, tmp_path):
    for step in (100, 200, 400):
        add_checkpoint(run_dir, step)
    assert command("--once", "--lower-is-better")[0] == 0
    assert record(tmp_path)["best"]["step"] == 200  # null at step 400 is no score
    assert command("--once")[0] == 0 and record(tmp_path)["best"]["step"] == 100
    status, _, errors = command("--once", "--score", "scores.c")
    assert status == 2 and "it has scores.a.b, scores.n" in errors[0]
    assert fake.seen == [100, 200, 400]


def test_an_interrupted_measurement_is_gone_on_with_or_begun_anew(command, fake, run_dir, tmp_path):
    def interrupt(_checkpoint):
        raise KeyboardInterrupt

    for step in (100, 200):
        add_checkpoint(run_dir, step)
    fake.on_step[200] = interrupt
    assert command("--once")[0] == 130
    assert [each["step"] for each in record(tmp_path)["checkpoints"]] == [100]
    assert command("--once")[0] == 0 and fake.seen == [100, 200, 200]
    assert not list((tmp_path / "out").glob("*.bak-*"))
    add_checkpoint(run_dir, 300)
    fake.on_step[300], fake.names = interrupt, []
    assert command("--once")[0] == 130 and command("--once")[0] == 0
    assert len(list((tmp_path / "out").glob("checkpoint_000300-*.bak-*"))) == 1


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_a_line(command, fake, run_dir, tmp_path):
    def delete(checkpoint):
        shutil.rmtree(checkpoint)
        raise FileNotFoundError(checkpoint)

    for step in (100, 200):
        add_checkpoint(run_dir, step)
    fake.on_step[100] = delete
    status, output, errors = command("--once")
    assert (status, errors, fake.seen) == (0, [], [100, 200])
    assert "checkpoint_000100: was deleted by its run" in output
    assert [each["step"] for each in record(tmp_path)["checkpoints"]] == [200]


def test_a_measurement_that_fails_ends_the_watch_with_its_own_line(command, fake, run_dir):
    def fail(_checkpoint):
        raise DataError("--data: d does not exist.")

    add_checkpoint(run_dir, 100)
    fake.on_step[100] = fail
    status, _, errors = command()
    assert (status, errors) == (2, ["error: --data: d does not exist."])


def test_a_step_that_a_resumed_run_wrote_anew_is_measured_anew(command, fake, run_dir, tmp_path):
    add_checkpoint(run_dir, 100)
    assert command("--once")[0] == 0
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint_000100")
    add_checkpoint(run_dir, 100, content="2")
    assert command("--once")[0] == 0 and fake.seen == [100, 100]
    assert len({each["folder"] for each in record(tmp_path)["checkpoints"]}) == 2


def test_what_a_user_gets_wrong_is_said_in_a_line_before_anything_is_measured(
    command, fake, run_dir, capsys, tmp_path
):
    add_checkpoint(run_dir, 100)
    for measurement, said in {
        (*MEASUREMENT, "--out", "x"): "--out: watch gives it",
        (*MEASUREMENT, "--checkpoint=x"): "--checkpoint: watch gives it",
        ("watch", "x"): "cannot be watched",
        ("trajectories",): "cannot be watched",
    }.items():
        status, _, errors = command(measurement=measurement)
        assert status == 2 and said in errors[0]
    (run_dir / "args.yaml").write_text("max_steps: many\n")
    assert "is not a number of steps" in command()[2][0]
    (run_dir / "args.yaml").unlink()
    assert "--once measures what is there" in command()[2][0]
    status, _, errors = run_evaluate(capsys, "watch", tmp_path / "none", "--", *MEASUREMENT)
    assert status == 2 and "is no run directory" in errors[0]
    assert fake.seen == []
    assert command("--once")[0] == 0 and fake.seen == [100]
    record_file = tmp_path / "out" / "watch.json"
    for content, said in (
        (record(tmp_path) | {"run": "/x"}, "record with run '/x'"),
        ({}, "record with run"),
    ):
        record_file.write_text(json.dumps(content))
        status, _, errors = command("--once")
        assert status == 2 and said in errors[0] and "choose another folder" in errors[0]


def test_a_real_measurement_is_watched(capsys, untrained_run, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(untrained_run("lora_ttt"), run_dir)
    data = write_bench(tmp_path / "data", seconds=0.4, num_samples=1)
    arguments = ["watch", run_dir, "--once", "--score", "scores.candor_pause_handling.takeover"]
    measurement = ["duplex", "--data", data, "--resamples", 20]
    wrong = run_evaluate(capsys, *arguments, "--", *measurement, "--tempo", 3)
    assert wrong[0] == 2 and "--tempo" in wrong[2][0] and not (run_dir / "evaluation").exists()
    status, output, errors = run_evaluate(capsys, *arguments, "--lower-is-better", "--", *measurement)
    assert (status, errors) == (0, []), output
    (path,) = run_dir.glob("evaluation/watch/duplex-*/watch.json")
    found = json.loads(path.read_text())
    assert found["best"]["step"] == 7 and found["best"]["score"] in (0, 1)
    assert (path.parent / found["best"]["folder"] / "results.json").is_file()
