"""The judge: applies the rules to the records of a run, as a pure function of their series.

So the monitor of a run that trains and the verdict on its log say the same.
"""

import math
import re
from dataclasses import dataclass

from finetune.diagnose.rules import RULES, Facts, HealthFinding, Record, Rule


class Judge:
    """Applies the rules to the records of a run, one after the other in order of their steps.

    Args:
        facts: of the configuration.

    Attributes:
        findings: all so far, those that are over too.
        judged: extremes and last value of what was judged, by rule and where.
    """

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self.findings: list[HealthFinding] = []
        self.judged: dict[tuple[Rule, str], Span] = {}
        self._courses: dict[tuple[Rule, str], _Course] = {}

    def see(self, step: int, record: Record) -> list[HealthFinding]:
        """Judge a record; returns the findings that are new."""
        new = []
        for name, value in with_gains(record).items():
            quantity, where = split_name(name)
            for rule in RULES:
                if rule.quantity != quantity or not rule.applies(self._facts, where, step, record):
                    continue
                number = math.nan if value is None else value
                self.judged.setdefault((rule, where), Span()).add(number)
                finding = self._courses.setdefault((rule, where), _Course(rule, where)).see(step, number)
                if finding is not None:
                    new.append(finding)
        self.findings += new
        return new

    def findings_of(self, rule: Rule, where: str) -> list[HealthFinding]:
        """Those of one rule in one place."""
        course = self._courses.get((rule, where))
        return [] if course is None else course.findings


@dataclass
class Span:
    """The values of one series.

    Attributes:
        low, high: of the finite ones.
        last: naN where it was not finite.
    """

    low: float = math.inf
    high: float = -math.inf
    last: float = math.nan

    def add(self, value: float) -> None:
        """The next value."""
        self.last = value
        if math.isfinite(value):
            self.low, self.high = min(self.low, value), max(self.high, value)


class _Course:
    """One rule in one place: outside after `patience` measurements in a row, inside again after as many."""

    def __init__(self, rule: Rule, where: str) -> None:
        self._rule, self._where = rule, where
        self._outside: list[int] = []  # steps in a row
        self._inside: list[int] = []
        self._last_outside = 0
        self._current: HealthFinding | None = None
        self.findings: list[HealthFinding] = []

    def see(self, step: int, value: float) -> HealthFinding | None:
        rule = self._rule
        if rule.holds(value):
            self._outside.clear()
            self._inside.append(step)
            if self._current is not None and len(self._inside) >= rule.patience:
                self._current.until = self._last_outside
                self._current = None
            return None
        self._inside.clear()
        self._outside.append(step)
        self._last_outside = step
        enough = len(self._outside) >= rule.patience or not math.isfinite(value)
        if self._current is not None or not enough:
            return None
        number = f"{value:.3g}" if math.isfinite(value) else "not finite"
        found = f"{rule.quantity} is {number}, healthy is {rule.range_text}"
        self._current = HealthFinding(rule.name, self._where, self._outside[0], None, found, rule.advice)
        self.findings.append(self._current)
        return self._current


def split_name(name: str) -> tuple[str, str]:
    """Quantity and place of a metric: `gate_speed/layer_3` is `gate_speed` of `layer 3`."""
    quantity, slash, layer = name.partition("/layer_")
    if slash:
        return quantity, f"layer {layer}"
    group = re.fullmatch(r"update_ratio_(.+)", name)
    return ("update_ratio", f"group {group[1]}") if group else (name, "")


def with_gains(record: Record) -> dict[str, float | None]:
    """A record with `inner_gain`, the share of the inner loss that a frame's own step takes away."""
    values = dict(record)
    for name, before in record.items():
        quantity, _ = split_name(name)
        if quantity != "inner_loss_before":
            continue
        suffix = name.removeprefix(quantity)
        after = record.get(f"inner_loss_after{suffix}")
        values[f"inner_gain{suffix}"] = (before - after) / before if before and after is not None else None
    return values
