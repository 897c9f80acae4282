"""The experiment on plants: its table, and a whole run in a short form."""

import json

import pytest

from experiments.planted.__main__ import main
from experiments.planted.report import read_arms, table, write_report


def write_results(folder, arms):
    folder.mkdir(parents=True)
    summaries = {
        arm: {
            lag: {measure: {"accuracy": share, "chance": 0.25} for measure in ("text", "audio")}
            for lag, share in by_lag.items()
        }
        for arm, by_lag in arms.items()
    }
    (folder / "results.json").write_text(json.dumps({"arms": summaries}))


def test_the_report_has_every_arm_of_both_models_with_the_seeds_in_their_order(tmp_path):
    for seed in (10, 2):
        ttt = {"off": {"30": 0.25, "125": 0.25}, "on": {"30": seed / 10, "125": 0.5}}
        write_results(tmp_path / f"seed{seed}" / "recall_ttt", ttt)
        write_results(tmp_path / f"seed{seed}" / "recall_none", {"plain": {"30": 0.25, "125": 0.25}})
    (tmp_path / "seed.log").touch()
    lines = table(read_arms(tmp_path), "text").splitlines()
    assert lines[0] == "| words, lag in frames | 30 | 125 |"
    assert lines[2:] == [
        "| memory on | 60.0 % (20, 100) | 50.0 % (50, 50) |",
        "| memory off | 25.0 % (25, 25) | 25.0 % (25, 25) |",
        "| fine-tuned without TTT | 25.0 % (25, 25) | 25.0 % (25, 25) |",
        "| chance | 25 % | 25 % |",
    ]
    report, picture = write_report(tmp_path)
    assert "all codebooks" in report.read_text() and picture.stat().st_size > 1000


@pytest.mark.slow
def test_a_short_run_measures_both_models_and_a_second_one_makes_nothing_again(tmp_path, monkeypatch, capfd):
    sizes = [
        "--num-items",
        "8",
        "--num-train",
        "2",
        "--base-steps",
        "1",
        "--short-steps",
        "1",
        "--steps",
        "1",
    ]
    arguments = ["planted", "--out", str(tmp_path), "--seeds", "1", "--lags", "30f", *sizes]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    arms = read_arms(tmp_path)
    assert list(arms) == ["on", "sessions", "frozen", "off", "plain"]
    assert [arms[arm][0]["30"]["text"]["accuracy"] for arm in ("frozen", "off", "plain")] == [0.25] * 3
    assert capfd.readouterr().out.count("python train.py") == 4
    assert main() == 0
    assert "python train.py" not in capfd.readouterr().out
