"""Which runs make up each study."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.fine_tuning.arms import Arm
from experiments.fine_tuning.tasks import PERIOD, AfterAGap, Filler, Pairs, Task, ThreeTimes, Twice

GAPS = (0, 32, 128, 512, 1024, 2048, 4096)
LENGTHS = (16, 32, 64, 128, 256)
NUMBERS_OF_PAIRS = (4, 8, 16, 32, 64, 128)

# The layer as it was published and as this project had it before, with its own initialisation of W0.
PUBLISHED_RATE: Mapping[str, Any] = {"base_lr": 0.1, "base_lr_scale": "published"}
PUBLISHED: Mapping[str, Any] = {**PUBLISHED_RATE, "key_shift": 0, "tied_start": False}
TEN: Mapping[str, Any] = {"weight_lr_multiplier": 10.0}
ONE_RATE: Mapping[str, Any] = {"weight_lr_multiplier": 1.0, "alpha_lr_multiplier": 1.0}
# A window that has so many more tokens in reach costs as many numbers as the fast weights of two layers.
EQUAL_WINDOW = 8 + 44


@dataclass(frozen=True)
class Plan:
    """A run to make, seeds apart.

    Attributes:
        arm, task: what is trained, and on what.
        difficulties: at which the recall is measured: gaps in tokens, or pairs to hold.
    """

    arm: Arm
    task: Task
    difficulties: tuple[int, ...] = ()


@dataclass(frozen=True)
class Study:
    """Runs that belong together.

    Attributes:
        plans: of the runs.
        difficulty: what its numbers count, None where it has none.
    """

    plans: list[Plan]
    difficulty: str | None = None


def _recall() -> list[Arm]:
    unshifted, untied = {"key_shift": 0}, {"tied_start": False}
    return [
        Arm("full", "attention to everything, no TTT", None, window=3 * PERIOD),
        Arm("window", "window alone", None),
        Arm("wider", "window, wider feed-forward with as many parameters", None, as_many_parameters=True),
        Arm("frozen", "TTT, fast weights frozen at W0", frozen=True),
        Arm("published", "TTT as published: no shift, no tie, `base_lr` 0.1", PUBLISHED),
        Arm("rate", "as published, with the inner rate of the defaults", {**unshifted, **untied}),
        Arm("rate-tie", "and keys that start as queries", unshifted),
        Arm("rate-shift", "and the key shift, without that start", untied),
        Arm("shift-tie", "key shift and tied start, with the published inner rate", PUBLISHED_RATE),
        Arm("defaults", "**the defaults: key shift, tied start, inner rate in shares**"),
        Arm("one-rate", "the defaults, one outer rate for everything", ONE_RATE),
        Arm("slow-gates", "the defaults, gates at the rate of the base", {"alpha_lr_multiplier": 1.0}),
        Arm("ttt-only", "the defaults, base frozen", trained="ttt"),
        Arm("lora", "the defaults, base frozen but for LoRA adapters", trained="lora"),
        Arm("defaults-400", "**the defaults, 400 steps**", num_steps=400),
        Arm("weights-10-400", "the same, TTT weights at 10 times the rate of the base", TEN, num_steps=400),
        Arm("published-400", "as published, 400 steps", PUBLISHED, num_steps=400),
    ]


def _retention() -> list[Plan]:
    plans = [
        _with_gaps(f"{filler}-{heads}x{64 // heads}", meaning, filler, heads=heads)
        for filler in ("other", "same")
        for heads, meaning in ((4, "4 heads of 16"), (1, "1 head of 64"))
    ]
    plans.append(_with_gaps("silence-4x16", "4 heads of 16", "silence", heads=4))
    for rate in (0.1, 0.3, 3.0):
        ttt = {"base_lr": rate, "base_lr_scale": "share"}
        plans.append(_with_gaps(f"same-rate{rate:g}", f"1 head of 64, `base_lr` {rate:g}", "same", ttt))
    for decay in (0.003, 0.03):
        ttt = {"state_decay": decay}
        plans.append(
            _with_gaps(f"same-decay{decay:g}", f"1 head of 64, `state_decay` {decay:g}", "same", ttt)
        )
    return plans


def _with_gaps(
    label: str, meaning: str, filler: Filler, ttt: Mapping[str, Any] | None = None, *, heads: int = 1
) -> Plan:
    arm = Arm(label, meaning, ttt or {}, num_steps=1500, heads=heads)
    return Plan(arm, AfterAGap(filler, longest=1024 if filler == "same" else 512), GAPS)


def _capacity() -> list[Plan]:
    arms = [
        Arm("window", "window alone", None),
        Arm("equal-window", f"window of {EQUAL_WINDOW}: equal bytes", None, window=EQUAL_WINDOW),
        Arm(
            "equal-window-5000",
            f"window of {EQUAL_WINDOW}, 5,000 steps: equal time",
            None,
            window=EQUAL_WINDOW,
            num_steps=5000,
        ),
        Arm("gated-delta", "gated delta rule, equal state", variant="gated-delta"),
        Arm("defaults", "**the defaults**"),
        Arm("defaults-1x64", "**the defaults**, 1 head of 64: 4 times the state", heads=1),
    ]
    return [Plan(arm, Twice(128), LENGTHS) for arm in arms]


def _pairs() -> list[Plan]:
    arms = [
        Arm("full", "attention to everything, no TTT", None, window=8 * NUMBERS_OF_PAIRS[-1], num_steps=2000),
        Arm("window", "window alone", None, num_steps=2000),
        Arm("defaults", "**the defaults**", num_steps=2000),
    ]
    return [Plan(arm, Pairs(64), NUMBERS_OF_PAIRS) for arm in arms]


def _learning() -> list[Arm]:
    by_steps = {"backend": "autograd"}  # what changes single steps is not known to the backward pass by hand
    return [
        Arm("defaults", "**the defaults**"),
        Arm("ascent", "inner gradient ascent", variant="ascent"),
        Arm("last-layer", "only the last inner layer learns", by_steps, variant="last-layer"),
        Arm("queries-for-keys", "queries in the place of keys", variant="queries-for-keys"),
        Arm("two-steps", "two inner steps per token", by_steps, variant="two-steps"),
        Arm("gated-delta", "gated delta rule, equal state", variant="gated-delta"),
    ]


def _mini_batch() -> list[Arm]:
    return [
        Arm(f"C{size}", f"`mini_batch_size` {size}", {"mini_batch_size": size}) for size in (16, 32, 64, 128)
    ]


def _head_width() -> list[Arm]:
    arms = []
    for width in (16, 64, 128):
        dim = max(64, width)
        for label, meaning, ttt in (("", "the defaults", {}), ("-published", "as published", PUBLISHED)):
            name = f"D{width}{label}"
            sizes = f"{meaning}, D = {width}"
            arms.append(Arm(name, sizes, ttt, num_steps=2000, heads=dim // width, dim=dim))
    return arms


def _three_times(arms: list[Arm]) -> Study:
    return Study([Plan(arm, ThreeTimes()) for arm in arms])


STUDIES: dict[str, Study] = {
    "recall": _three_times(_recall()),
    "retention": Study(_retention(), "tokens in between"),
    "capacity": Study(_capacity(), "tokens heard once"),
    "pairs": Study(_pairs(), "pairs"),
    "learning": _three_times(_learning()),
    "mini-batch": _three_times(_mini_batch()),
    "head-width": _three_times(_head_width()),
}
