"""The command of the failure gallery: what it writes, and what it never replaces."""

import json

import pytest

from experiments.failures.__main__ import main
from experiments.failures.cases import CASES
from finetune.commands import run_command
from finetune.diagnose.rules import RULES


def status(*arguments):
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: main([str(argument) for argument in arguments]))
    return caught.value.code


@pytest.mark.slow
def test_two_cases_give_a_table_results_and_figures(tmp_path, capsys):
    out = tmp_path / "new" / "failures"
    assert main(["healthy", "base_lr_1000", "--steps", "6", "--out", str(out)]) == 0
    report = (out / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "| carried memory, `base_lr: 1000` | fast weights explode (2) | yes |" in report
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 6 and list(results["cases"]) == ["healthy", "base_lr_1000"]
    assert results["cases"]["base_lr_1000"]["quantities"]["fast_weight_change"]["highest"] > 3
    for name in ("healthy.png", "base_lr_1000.png", "cases.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path, capsys):
    mine = tmp_path / "healthy" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    assert status("healthy", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "is not empty; give a new folder" in error and error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_an_unknown_case_is_one_line_and_status_2(tmp_path, capsys):
    assert status("nonsense", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "nonsense: no such case; there are healthy" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_rule_has_a_case():
    assert {rule.name for rule in RULES} <= {name for case in CASES.values() for name in case.expected}
