"""What evaluate.py saves of spoken scores: nothing complete is lost, and what is missing is booked."""

import json
import os
from pathlib import Path

import pytest

from evaluation_helpers import failure
from finetune.errors import ConfigError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.spoken import command as spoken
from finetune.evaluation.spoken import saving
from run_helpers import checkpoint_content, write_untrained_run
from spoken_helpers import spoken_command, write_sblimp, write_stories, write_swuggy

NUM_IDS = 4
TASKS = ["swuggy", "sblimp", "tstory"]


@pytest.fixture
def data(tmp_path) -> Path:
    """Miniature sWUGGY, sBLIMP and tStoryCloze that a test may change."""
    root = tmp_path / "data"
    write_swuggy(root, num_ids=NUM_IDS)
    write_sblimp(root, num_ids=NUM_IDS)
    write_stories(root / "tSC", num_ids=2)
    return root


@pytest.fixture
def command(capsys, untrained_run, data, tmp_path):
    """Run a measurement in this process; return its status, output and error lines."""
    return spoken_command(capsys, untrained_run, data, tmp_path)


@pytest.fixture
def run_dir(tiny_base, tmp_path) -> Path:
    """A run directory of this test alone, for results in its default folder."""
    return write_untrained_run(tmp_path / "run", "lora_ttt", tiny_base)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def interrupt(monkeypatch, task: str) -> None:
    """Ctrl-C when a task is about to be scored."""
    original = spoken.measure_items

    def measure(lm, encoded, **settings):
        if encoded.name == task:
            raise KeyboardInterrupt
        return original(lm, encoded, **settings)

    monkeypatch.setattr(spoken, "measure_items", measure)


def results_of(run_dir: Path) -> Path:
    """The only results.json, complete or not, below a run directory."""
    (path,) = (run_dir / "evaluation" / "spoken").glob("*/results*.json")
    return path


def test_an_interrupted_rerun_leaves_complete_results_alone(command, run_dir, monkeypatch):
    assert command("all", checkpoint=run_dir, out=None)[0] == 0
    path = results_of(run_dir)
    complete = path.read_bytes()
    with monkeypatch.context() as patch:
        interrupt(patch, "tstory")
        assert command("all", checkpoint=run_dir, out=None)[0] == 130
    assert path.read_bytes() == complete and list(json.loads(complete)["scores"]) == TASKS
    partial = path.with_name("results.partial.json")
    assert list(read(partial)["scores"]) == TASKS[:2]
    with monkeypatch.context() as patch:
        interrupt(patch, "sblimp")
        assert command("all", checkpoint=run_dir, out=None)[0] == 130
    for part in ("scores", "tasks", "items", "pairs"):  # sBLIMP of the one before is still there
        assert set(read(partial)[part]) == set(TASKS[:2])
    assert command("all", checkpoint=run_dir, out=None)[0] == 0
    assert list(read(results_of(run_dir))["scores"]) == TASKS  # and no other file


def test_results_of_another_model_or_of_more_tasks_are_kept(command, run_dir, data, monkeypatch):
    assert command("all", checkpoint=run_dir, out=None)[0] == 0
    path = results_of(run_dir)
    of_three = path.read_bytes()
    (data / "tSC").rename(data / "gone")
    _, output, _ = command("all", checkpoint=run_dir, out=None)
    (backup,) = path.parent.glob("results.json.bak-*")
    assert backup.read_bytes() == of_three and list(read(path)["scores"]) == TASKS[:2]
    assert f"holds other results, kept as {backup.name}" in output
    backup.unlink()
    assert command("all", checkpoint=run_dir, out=None)[0] == 0  # the same again replaces it
    assert not list(path.parent.glob("*.bak-*"))

    of_two = path.read_bytes()
    training = checkpoint_content(run_dir) / "training.json"
    training.write_text(json.dumps(read(training) | {"first_codebook_weight_multiplier": 2.0}))
    assert command("all", checkpoint=run_dir, out=None)[0] == 0
    (backup,) = path.parent.glob("results.json.bak-*")
    assert backup.read_bytes() == of_two and read(path)["model"]["semantic_weight"] == 2
    with monkeypatch.context() as patch:
        interrupt(patch, "sblimp")
        assert command("all", checkpoint=run_dir, out=None)[0] == 130
    partial = path.with_name("results.partial.json")
    half = partial.read_bytes()
    training.write_text(json.dumps(read(training) | {"first_codebook_weight_multiplier": 3.0}))
    assert command("all", checkpoint=run_dir, out=None)[0] == 0
    (backup,) = path.parent.glob("results.partial.json.bak-*")
    assert backup.read_bytes() == half and not partial.exists()


@pytest.mark.parametrize("name", saving.ALL_FILES)
def test_a_folder_with_results_at_any_place_is_refused(command, tmp_path, untrained_run, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("kept")
    run = untrained_run("lora_ttt")
    for options in ((), ("--compare", run, run)):
        line = failure(command, tmp_path, "swuggy", *options)
        assert f"out holds {name} already; choose another folder" in line
    assert path.read_text() == "kept"


@pytest.mark.parametrize("below", ["evaluation", "evaluation/spoken"])
def test_a_default_folder_that_cannot_be_made_is_refused_before_anything_slow(
    command, run_dir, monkeypatch, below
):
    (run_dir / below).parent.mkdir(exist_ok=True)
    (run_dir / below).touch()
    monkeypatch.setattr(spoken, "load_from_options", None)
    line = failure(command, run_dir, "swuggy", checkpoint=run_dir, out=None)
    assert f"{run_dir / below} is not a folder that may be written; choose a folder with --out" in line
    assert not line.startswith("error: --out")


def test_a_folder_that_cannot_be_written_after_all_is_refused_before_the_encoding(command, monkeypatch):
    monkeypatch.setattr(spoken, "encode_pairs", None)
    status, _, errors = command("swuggy", "--out", "/proc/nowhere/out", out=None)
    assert (status, len(errors)) == (2, 1) and "cannot be written: " in errors[0]


def test_scores_are_saved_before_intervals_and_files_for_the_challenge(command, tmp_path, monkeypatch):
    def too_many(self, numerators, denominators):
        raise ConfigError("--resamples: too many.")

    with monkeypatch.context() as patch:
        patch.setattr(RatioBootstrap, "interval", too_many)
        status, _, errors = command("swuggy")
    assert (status, errors) == (2, ["error: --resamples: too many."])
    found = read(tmp_path / "out" / "results.partial.json")
    assert 0 <= found["scores"]["swuggy"] <= 1 and len(found["items"]["swuggy"]) == 4 * NUM_IDS

    def write(folder, measured, *, split):
        raise ConfigError(f"{folder}: cannot be written.")

    monkeypatch.setattr(spoken, "write_submission", write)
    status, _, errors = command("swuggy", out="full")
    assert status == 2 and "cannot be written" in errors[0]
    assert read(tmp_path / "full" / "results.json")["scores"] == found["scores"]


@pytest.mark.parametrize("corrupt", [False, True])
def test_missing_and_corrupt_files_are_booked_alike(command, data, tmp_path, corrupt):
    wavs = data / "lexical" / "dev"
    broken = [wavs / f"item{number:03d}.wav" for number in (0, 1, 2, 3, 4)]  # id 0, and voice A of id 1
    for path in broken:
        path.unlink()
        if corrupt:
            path.write_bytes(b"noise")
    status, output, _ = command("swuggy", "--max-failures", 5)
    entry = read(tmp_path / "out" / "results.json")["tasks"]["swuggy"]
    assert status == 0 and entry["failures"].keys() == {path.stem for path in broken}
    counts = [entry[name] for name in ("num_pairs", "num_pairs_asked", "num_ids", "num_ids_of_data")]
    assert counts == [2 * NUM_IDS - 3, 2 * NUM_IDS, NUM_IDS - 1, NUM_IDS]
    assert [(pair["id"], pair["voice"]) for pair in entry["excluded_pairs"]] == [
        *(("0", "A"), ("0", "B"), ("1", "A"))
    ]
    assert f"({NUM_IDS - 1} of {NUM_IDS} ids)" in output and not entry["subset"]


def test_failures_outside_a_subset_do_not_count(command, data, tmp_path):
    assert command("swuggy", "--limit", 2, out="whole")[0] == 0
    drawn = {pair["id"] for pair in read(tmp_path / "whole" / "results.json")["pairs"]["swuggy"]}
    gold = (data / "lexical" / "dev" / "gold.csv").read_text().splitlines()
    for line in gold[1:]:
        name, id_ = line.split(",")[:2]
        if id_ not in drawn:
            (data / "lexical" / "dev" / f"{name}.wav").unlink()
    status, _, errors = command("swuggy", "--limit", 2)
    assert (status, errors) == (0, [])
    entry = read(tmp_path / "out" / "results.json")["tasks"]["swuggy"]
    assert (entry["num_ids"], entry["num_ids_of_data"], entry["failures"]) == (2, NUM_IDS, {})


def test_nothing_to_score_fails_whatever_may_fail(command, data, tmp_path, untrained_run):
    for path in (data / "tSC").glob("*.wav"):
        path.write_bytes(b"noise")
    run = untrained_run("lora_ttt")
    for out, options in (("one", ()), ("two", ("--compare", run, run))):
        status, _, errors = command("all", "--max-failures", 99, *options, out=out)
        assert status == 2 and errors[0].startswith("error: tstory: no pair is left, 0_0_correct: ")
        found = read(tmp_path / out / ("comparison.json" if options else "results.json"))
        assert found["differences" if options else "scores"]["tstory"] is None
        assert found["differences" if options else "scores"]["swuggy"] is not None


def test_a_comparison_says_what_was_compared(command, data, tmp_path, untrained_run):
    (data / "lexical" / "dev" / "item000.wav").write_bytes(b"noise")
    run = untrained_run("lora_ttt")
    status, _, errors = command("swuggy", "--compare", run, untrained_run("ttt"), "--max-failures", 1)
    assert (status, errors) == (0, [])
    entry = read(tmp_path / "out" / "comparison.json")["tasks"]["swuggy"]
    tasks = [
        read(tmp_path / "out" / part / "results.json")["tasks"]["swuggy"] for part in ("first", "second")
    ]
    assert entry["data"] == [task["data"] for task in tasks]
    assert entry["data"][0]["path"] == os.path.abspath(data) and entry["data"][0] == entry["data"][1]
    assert [set(failures) for failures in entry["failures"]] == [{"item000"}, {"item000"}]
    assert entry["excluded_pairs"] == [{"id": "0", "voice": "A", "items": ["item000", "item001"]}]
