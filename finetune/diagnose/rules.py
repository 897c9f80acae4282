"""What is healthy: a range for each quantity that a run logs, and what to try outside it.

The ranges were set where runs that work and those of `experiments.failures` part. The quickstart (200
steps, measured every 5) stays inside all of them, and far from most: fast weights changed by at most 0.03,
updates reached 0.18 of attention, steps 0.008 of the weights, gates moved by at least 5e-4 a step. The
configurations for Moshi 7B in `example/` were not trained for this.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetune.args import TrainArgs, TTTArgs
from finetune.ttt_utils import outer_learning_rates

Record = Mapping[str, float | None]  # by metric name; None: not finite
_FULL_RATE = 0.1  # share of its peak from which on an outer rate counts: AdamW's steps are no longer than it
_SLOWEST_GATE = 1e-6  # a step: 0.02 in 20,000
_FASTEST_GATES = 6e-4  # an outer rate: the fastest of the documents' table, for Moshi 7B
SPLIT = "diagnostics"  # of the records


@dataclass(frozen=True)
class Facts:
    """What of a configuration the rules ask for.

    Attributes:
        peak_rates: outer rate of each group at its peak.
        warmup_steps: until that peak.
        starts_open: whether the gates already start above 0.9.
    """

    peak_rates: Mapping[str, float]
    warmup_steps: float
    starts_open: bool

    @classmethod
    def of(cls, args: TrainArgs) -> "Facts":
        """Of a configuration."""
        opening = abs(math.tanh(args.ttt.initial_gating_alpha))
        return cls(
            outer_learning_rates(args),
            args.optim.num_warmup_steps(args.max_steps),
            opening > 0.9 or not args.ttt.gating_trainable,
        )

    def at_full_rate(self, group: str, step: int, record: Record) -> bool:
        """Whether a group is past the warm-up and not yet in the tail of the schedule."""
        rate = record.get(f"lr_{group}")
        return rate is not None and step > self.warmup_steps and rate >= _FULL_RATE * self.peak_rates[group]


@dataclass(frozen=True)
class Rule:
    """A healthy range of one quantity.

    Attributes:
        name: of the failure; several quantities may tell of the same one.
        quantity: metric name without its layer or group.
        lowest, highest: of the range, None: open on that side.
        advice: what to try.
        applies: whether a value counts: facts, where (`layer 3`), step, record.
        patience: measurements in a row that it takes to be outside, and as many to be back inside. A value
            that is not finite is outside at once.
    """

    name: str
    quantity: str
    lowest: float | None
    highest: float | None
    advice: str
    applies: Callable[[Facts, str, int, Record], bool] = lambda facts, where, step, record: True
    patience: int = 3

    def holds(self, value: float) -> bool:
        """Whether a value is inside the range."""
        above = self.lowest is None or value >= self.lowest
        below = self.highest is None or value <= self.highest
        return math.isfinite(value) and above and below

    @property
    def range_text(self) -> str:
        """`0.99 to 1.01`, `at least 0`, `at most 100`."""
        if self.lowest is None:
            return f"at most {self.highest:g}"
        if self.highest is None:
            return f"at least {self.lowest:g}"
        return f"{self.lowest:g} to {self.highest:g}"


@dataclass
class HealthFinding:
    """Something that is wrong with a run.

    Attributes:
        name: of the failure.
        where: `layer 3`, `group base`, `configuration`.
        since: first step of the violation.
        until: last step of it, None while it goes on.
        found: quantity, value and range, or what the configuration says.
        advice: what to try.
    """

    name: str
    where: str
    since: int
    until: int | None
    found: str
    advice: str

    def line(self) -> str:
        """The one line of the log."""
        since = "" if self.where == "configuration" else f" since step {self.since}"
        return f"Diagnostics: {self.name}, {self.where}{since}: {self.found}. {self.advice}"


def _gate_trains(facts: Facts, where: str, step: int, record: Record) -> bool:
    return facts.at_full_rate("ttt_alpha", step, record)


def _gate_shall_move(facts: Facts, where: str, step: int, record: Record) -> bool:
    speed = record.get(f"gate_speed/{where.replace(' ', '_')}")
    return _gate_trains(facts, where, step, record) and speed is not None and speed >= _SLOWEST_GATE


def _warms_up(facts: Facts, where: str, step: int, record: Record) -> bool:
    return not facts.starts_open and step <= facts.warmup_steps


def _is_weights(facts: Facts, where: str, step: int, record: Record) -> bool:
    return where != "group ttt_alpha"  # gates start near 0, where every step is large beside them


def _weights_train(facts: Facts, where: str, step: int, record: Record) -> bool:
    is_full = facts.at_full_rate(where.removeprefix("group "), step, record)
    return is_full and _is_weights(facts, where, step, record)


_BUG = "This is a bug of the model's code, not of the settings: please report it."
_CALMER = "Lower ttt.weight_lr_multiplier or ttt.base_lr."
RULES = (
    Rule(
        "gate frozen",
        "gate_speed",
        _SLOWEST_GATE,
        None,
        "Raise ttt.alpha_lr_multiplier.",
        _gate_trains,
    ),
    Rule(
        "gate cannot move",
        "gate_movable",
        0.5,
        None,
        "The steps are below the spacing of the gate's dtype: keep the gates in float32.",
        _gate_shall_move,
    ),
    Rule(
        "gate open too early",
        "gate_opening",
        None,
        0.9,
        "Lower ttt.alpha_lr_multiplier.",
        _warms_up,
        patience=1,
    ),
    Rule("fast weights explode", "fast_weight_change", None, 3.0, _CALMER),
    Rule("output amplified", "ttt_amplification", None, 100.0, _CALMER),
    Rule("normalisation broken", "key_norm_min", 0.99, None, _BUG, patience=1),
    Rule("normalisation broken", "key_norm_max", None, 1.01, _BUG, patience=1),
    Rule("normalisation broken", "target_std", 1e-4, None, _BUG, patience=1),
    Rule("normalisation broken", "target_norm_error", None, 0.01, _BUG, patience=1),
    Rule("inner loss does not fall", "inner_gain", 0.0, None, "Change ttt.base_lr; too high is likelier."),
    Rule("TTT drowns attention", "ttt_over_attention", None, 10.0, "Lower ttt.alpha_lr_multiplier."),
    Rule(
        "steps too large",
        "update_ratio",
        None,
        0.03,
        "Lower optim.lr or the group's multiplier.",
        _is_weights,
    ),
    Rule(
        "steps too small",
        "update_ratio",
        1e-8,
        None,
        "Raise optim.lr or the group's multiplier.",
        _weights_train,
    ),
)


def configuration_findings(args: TrainArgs) -> list[HealthFinding]:
    """What is wrong before the first step."""
    if not has_ttt(args) or args.ttt.causal:
        return []
    return [
        HealthFinding(
            "future leaks",
            "configuration",
            0,
            None,
            "ttt.causal is false, so the training loss is better than the model can be in a stream",
            "Set ttt.causal: true, unless the published form is what is studied.",
        )
    ]


def configuration_remarks(args: TrainArgs) -> list[str]:
    """What is unusual before the first step and may yet work, a line each."""
    if not has_ttt(args):
        return []
    ttt, defaults = args.ttt, TTTArgs()
    if ttt.weight_lr_multiplier == ttt.alpha_lr_multiplier == 1:
        return [
            f"Note: one outer rate, all groups train at optim.lr {args.optim.lr:g}, gates as slowly as the "
            "rest (ttt.weight_lr_multiplier and ttt.alpha_lr_multiplier are 1, defaults are "
            f"{defaults.weight_lr_multiplier:g} and {defaults.alpha_lr_multiplier:g})."
        ]
    rate = args.optim.lr * ttt.alpha_lr_multiplier
    if not ttt.gating_trainable or rate < 1.001 * _FASTEST_GATES:
        return []
    return [
        f"Note: gates train at {rate:.2g} (optim.lr {args.optim.lr:g} x ttt.alpha_lr_multiplier "
        f"{ttt.alpha_lr_multiplier:g}), above the {_FASTEST_GATES:g} of docs/training.md: they may open "
        "within some steps. Small models in short runs want that, a large one rather not."
    ]


def has_ttt(args: TrainArgs) -> bool:
    """Whether a run has TTT layers."""
    return args.ttt.enable and args.ttt.layers != "none"
