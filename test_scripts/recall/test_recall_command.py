"""evaluate.py recall: results, going on, comparisons, failures, a user's mistakes."""

import json
import shutil

import numpy as np
import pytest
import sphn

import run_helpers
from evaluation_helpers import failure, run_evaluate
from miniatures.recall import RATE, write_items
from run_helpers import write_untrained_run

LAGS = ("--lags", "20,4.8")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return write_items(tmp_path_factory.mktemp("recall") / "items")


@pytest.fixture
def copied(items, tmp_path):
    return shutil.copytree(items, tmp_path / "items")


@pytest.fixture(scope="module")
def short_sighted(tiny_base, tmp_path_factory):
    """A run whose attention does not reach back for 20 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run_helpers.TTT, "non_ttt_layer_context", 25)
        return write_untrained_run(tmp_path_factory.mktemp("short") / "run", "lora_ttt", tiny_base)


@pytest.fixture
def command(capsys, short_sighted, tmp_path):
    """Run it on a folder of items; exit status, output and errors."""

    def run(data, *options, checkpoint=short_sighted, out="out"):
        where = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / out)
        return run_evaluate(capsys, "recall", *where, *LAGS, "--resamples", 50, *options)

    return run


@pytest.fixture
def results(command, tmp_path):
    """Run it without mistakes; what it wrote, and its output."""

    def run(data, *options, out="out", **settings):
        status, output, errors = command(data, *options, out=out, **settings)
        assert (status, errors) == (0, []), (output, errors)
        return json.loads((tmp_path / out / "results.json").read_text()) | {"output": output}

    return run


def test_every_arm_lag_and_part_has_its_accuracy_and_chance_is_exact(results, items, tmp_path):
    found = results(items)
    assert list(found["arms"]) == ["on", "frozen", "off", "sessions"]
    assert set(found["said_by"]) == {"user", "moshi"} and set(found["kind"]) == {"name", "place"}
    assert list(found["differences"]) == ["on - frozen", "on - off", "on - sessions"]
    for arm, by_lag in found["arms"].items():
        assert list(by_lag) == ["60", "250"]
        for by_measure in by_lag.values():
            assert all(entry["chance"] == 0.5 for entry in by_measure.values())
            assert all(entry["num_conversations"] == 6 for entry in by_measure.values())
        if arm in ("frozen", "off"):  # nothing of the plant is within reach after 20 s
            assert all(entry["accuracy"] == 0.5 for entry in by_lag["250"].values())
            assert all(abs(entry["margin"]) < 1e-4 for entry in by_lag["250"].values())
    assert any(entry["margin"] != 0 for entry in found["arms"]["on"]["250"].values())
    assert "chance is 50.0 %" in found["output"] and "20 s" in found["output"]
    lines = (tmp_path / "out" / "items.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3 * 2 * 3
    assert (tmp_path / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_batches_chunks_and_interruptions_change_nothing(results, items, tmp_path):
    whole = results(items, "--batch-size", 3, "--arms", "on", "sessions")
    scores = tmp_path / "out" / "scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join(lines[: len(lines) // 2])[:-20])
    gone_on = results(items, "--batch-size", 1, "--chunk-frames", 11, "--arms", "on", "sessions")
    assert "measurements were there already" in gone_on["output"]
    apart = results(items, "--batch-size", 1, "--chunk-frames", 64, "--arms", "on", "sessions", out="other")
    for arm, by_lag in whole["arms"].items():
        for lag, by_measure in by_lag.items():
            for measure, entry in by_measure.items():
                for other in (gone_on, apart):
                    again = other["arms"][arm][lag][measure]
                    assert again["margin"] == pytest.approx(entry["margin"], abs=1e-4)
                    assert again["accuracy"] == entry["accuracy"]


def test_two_checkpoints_are_compared_on_the_same_items(results, items, untrained_run):
    found = results(items, "--compare", untrained_run("full"), "--arms", "on")
    assert found["comparison"]["arms"] == ["on", "plain"] and found["comparison"]["num_items"] == 3
    entry = found["comparison"]["first - second"]["250"]["text"]
    assert -0.5 <= entry["accuracy"] <= 0.5 and "first - second" in found["output"]
    assert len(found["models"]) == 2


def test_a_damaged_item_is_an_error_by_name_and_never_a_number(command, copied, tmp_path):
    (copied / "1" / "plant0.wav").write_bytes(b"RIFF nothing")
    sphn.write_wav(str(copied / "2" / "cue0.wav"), np.zeros((1, 1920), dtype=np.float32), RATE)
    status, _, errors = command(copied, "--arms", "frozen")
    assert status == 2 and "--max-failures: 2 of the items failed, 0 may; " in errors[0]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["failures"]) == {"group1", "group2"} and "is mono" in found["failures"]["group2"]
    assert found["arms"]["frozen"]["250"]["text"]["num_items"] == 1
    assert "group1" not in (tmp_path / "out" / "items.csv").read_text()
    status, _, errors = command(copied, "--arms", "frozen", "--max-failures", 2)
    assert (status, errors) == (0, [])


MISTAKES = {
    "lag": (("--lags", "0.1"), "--lags: 0.08 s are 1 frames, shorter than the longest cue of the items"),
    "no lag": (("--lags", "soon"), "'soon' is neither seconds nor frames such as 125f"),
    "mode": (("--ttt", "off"), "--ttt off: what the memory does is chosen with --arms"),
    "arm twice": (("--arms", "on", "on"), "--arms: on on names one twice"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(command, items, tmp_path, mistake):
    options, message = MISTAKES[mistake]
    assert message in failure(lambda: command(items, *options), tmp_path)


def test_a_model_without_ttt_has_no_arms(command, items, untrained_run, tmp_path):
    line = failure(lambda: command(items, "--arms", "on", checkpoint=untrained_run("full")), tmp_path)
    assert "--arms: " in line and "has no TTT layers; leave it out" in line


def test_a_folder_of_other_items_is_not_gone_on_with(results, command, items, copied):
    results(items, "--arms", "off")
    status, _, (error,) = command(copied, "--arms", "off")
    assert status == 2 and "holds a measurement with data " in error
