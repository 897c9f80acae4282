"""The comparison of one outer rate with three in a short form."""

import json
import re

import pytest
import sphn

from experiments.compare_lr.__main__ import main
from finetune.commands import run_command

pytestmark = pytest.mark.slow  # two trainings, evaluations and samples


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "new"
    small = ["--steps", "4", "--seeds", "3", "--batch-size", "1", "--dialogues", "1"]
    assert main([*small, "--out", str(folder)]) == 0
    return folder


def test_only_the_rates_differ_and_the_gates_go_further_with_three(out):
    runs = json.loads((out / "results.json").read_text())["runs"]
    (one,), (three,) = runs["one"], runs["three"]
    assert set(one["rates"].values()) == {0.002}
    assert three["rates"] == pytest.approx({"base": 0.002, "ttt_weights": 0.006, "ttt_alpha": 0.06})
    assert one["seed"] == three["seed"] == 3
    assert one["train"]["step"] == three["train"]["step"] == [1, 2, 3, 4]
    assert one["train"]["loss"][0] == three["train"]["loss"][0]  # the same weights and data
    assert three["train"]["ttt_delta"][-1] > 5 * one["train"]["ttt_delta"][-1] > 0
    assert one["findings"] == three["findings"] == [] and one["diverged"] is None


def test_the_report_has_a_row_for_each_arm_and_the_figure_is_there(out):
    rows = re.findall(r"^\| (.+?) \|", (out / "report.md").read_text(), re.MULTILINE)
    assert rows == ["arm", "before the first step", "one rate", "three rates"]
    assert (out / "compare_lr.png").read_bytes().startswith(b"\x89PNG")


def test_each_run_leaves_a_sample_of_its_end(out):
    for runs in json.loads((out / "results.json").read_text())["runs"].values():
        audio, sample_rate = sphn.read(out / runs[0]["sample"])
        assert audio.shape[0] == 2 and audio.shape[1] / sample_rate == pytest.approx(8, abs=0.1)


def test_a_folder_that_is_not_empty_is_left_as_it_is(out, capsys):
    before = (out / "results.json").read_bytes()
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main(["--out", str(out)]))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "is not empty" in error and error.count("\n") == 1
    assert (out / "results.json").read_bytes() == before
