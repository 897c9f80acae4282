"""The page on diagnostics says of every rule what the rule says."""

import re

from finetune.diagnose.rules import RULES
from project_root import ROOT

PAGE = ROOT / "docs" / "diagnostics.md"


def test_the_table_has_the_range_of_every_rule_and_no_other():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == [(rule.quantity, rule.range_text, rule.name) for rule in RULES]


def test_every_quantity_is_explained_with_the_keys_that_its_advice_names():
    _, _, sections = PAGE.read_text("utf-8").partition("### Gates")
    bullets = re.split(r"^- |(?<=\. )(?=\*\*`)", sections, flags=re.MULTILINE)
    for rule in RULES:
        explained = [part for part in bullets if re.match(rf"\*\*`(\w+`, `)*{rule.quantity}`", part)]
        assert len(explained) == 1, rule.quantity
        for key in re.findall(r"(?:ttt|optim)\.\w+", rule.advice):
            assert f"`{key}`" in explained[0], (rule.quantity, key)
