"""Judges a run by what it has written: the same rules as while it trains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.args import TrainArgs
from finetune.config_io import load_run_args
from finetune.diagnose.judge import Judge, Span, split_name, with_gains
from finetune.diagnose.rules import (
    RULES,
    SPLIT,
    Facts,
    HealthFinding,
    Rule,
    configuration_findings,
    configuration_remarks,
    has_ttt,
)
from finetune.errors import ConfigError
from finetune.monitoring.metrics_file import METRICS_FILE, LogRecord, read_records


@dataclass(frozen=True)
class Judgement:
    """One rule in one place.

    Attributes:
        rule: applied.
        where: `layer 3`, `group base`.
        span: of the values judged.
        findings: of this rule here, in order.
    """

    rule: Rule
    where: str
    span: Span
    findings: Sequence[HealthFinding]

    @property
    def verdict(self) -> str:
        """`ok`, or the name of the failure with its steps."""
        if not self.findings:
            return "ok"
        steps = [
            f"since step {f.since}" if f.until is None else f"steps {f.since} to {f.until}"
            for f in self.findings
        ]
        return f"{self.findings[0].name} ({', '.join(steps)})"


@dataclass(frozen=True)
class Diagnosis:
    """What a run directory tells.

    Attributes:
        run_dir: judged.
        args: its configuration.
        num_records: measurements judged.
        last_step: of the last one.
        judgements: by rule and place.
        findings: all violations, those of the configuration first.
        missing: lines about what could not be judged.
        remarks: lines about what is unusual in the configuration and may yet work.
        series: steps and values by quantity and place, those that are not finite as NaN.
    """

    run_dir: Path
    args: TrainArgs
    num_records: int
    last_step: int
    judgements: Sequence[Judgement]
    findings: Sequence[HealthFinding]
    missing: Sequence[str]
    remarks: Sequence[str]
    series: dict[str, dict[str, tuple[list[int], list[float]]]]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing was outside its range at any time."""
        return not self.findings


def diagnose_run(run_dir: Path) -> Diagnosis:
    """Judge a run that is over, going on or broken off.

    A run without records of its diagnostics is judged by its training records, which hold part of the
    quantities.

    Raises:
        ConfigError: there is no run, or nothing of it can be judged.
        DataError: its log is damaged.
    """
    args = load_run_args(run_dir)
    records = read_records(run_dir, SPLIT)
    missing = []
    if not records:
        records = read_records(run_dir, "train")
        missing.append(f"There are no records of {SPLIT} (diagnostics.freq); training records are judged.")
    judge = Judge(Facts.of(args))
    for record in records:
        judge.see(record.step, record.values)
    if not judge.judged:
        step = args.diagnostics.freq or 10
        raise ConfigError(
            f"{run_dir / METRICS_FILE}: has nothing to judge yet; wait for step {step}, go on with "
            f"train.py --resume {run_dir}, or train with diagnostics.freq above 0."
        )
    judgements = [
        Judgement(rule, where, span, judge.findings_of(rule, where))
        for (rule, where), span in sorted(judge.judged.items(), key=_place)
    ]
    missing += _not_judged(args, judge)
    findings = [*configuration_findings(args), *judge.findings]
    return Diagnosis(
        run_dir,
        args,
        len(records),
        records[-1].step,
        judgements,
        findings,
        missing,
        configuration_remarks(args),
        _series(records),
    )


def table_lines(diagnosis: Diagnosis) -> list[str]:
    """A table for the terminal: each quantity with its extremes, range and verdict."""
    head = (
        f"{'quantity':<20} {'where':<17} {'lowest':>10} {'highest':>10} {'last':>10}  {'healthy':<15} verdict"
    )
    return [head] + [
        f"{j.rule.quantity:<20} {j.where:<17} {_number(j.span.low)} {_number(j.span.high)} "
        f"{_number(j.span.last)}  {j.rule.range_text:<15} {j.verdict}"
        for j in diagnosis.judgements
    ]


def remark_lines(diagnosis: Diagnosis) -> list[str]:
    """Beside the table: the findings, what could not be judged, what is unusual."""
    return [*(finding.line() for finding in diagnosis.findings), *diagnosis.missing, *diagnosis.remarks]


def conclusion(diagnosis: Diagnosis) -> str:
    """One line at the end."""
    seen = f"{diagnosis.num_records} measurements until step {diagnosis.last_step}"
    if diagnosis.is_healthy:
        return f"Healthy: {seen}, nothing outside its range" + (
            ", of what could be judged." if diagnosis.missing else "."
        )
    names = ", ".join(dict.fromkeys(finding.name for finding in diagnosis.findings))
    return f"Not healthy: {seen}; {names}."


def _place(item: tuple[tuple[Rule, str], Span]) -> tuple[int, int, str]:
    (rule, where), _ = item
    digits = where.removeprefix("layer ")
    return RULES.index(rule), int(digits) if digits.isdecimal() else -1, where


def _not_judged(args: TrainArgs, judge: Judge) -> list[str]:
    """Which quantities a run has never been judged by, in a line; without TTT only those of the rest."""
    judged = {rule.quantity for rule, _ in judge.judged}
    rules = [rule for rule in RULES if has_ttt(args) or rule.quantity == "update_ratio"]
    names = dict.fromkeys(rule.quantity for rule in rules if rule.quantity not in judged)
    return [f"Not judged so far: {', '.join(names)}."] if names else []


def _series(records: Sequence[LogRecord]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    wanted = {rule.quantity for rule in RULES}
    series: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for record in records:
        for name, value in with_gains(record.values).items():
            quantity, where = split_name(name)
            if quantity in wanted:
                steps, values = series.setdefault(quantity, {}).setdefault(where, ([], []))
                steps.append(record.step)
                values.append(math.nan if value is None else value)
    return series


def _number(value: float) -> str:
    return f"{value if math.isfinite(value) else math.nan:>10.3g}"
