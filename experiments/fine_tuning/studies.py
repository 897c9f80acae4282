"""Which runs make up each study."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.fine_tuning.arms import Arm
from experiments.fine_tuning.tasks import PERIOD, AfterAGap, Task, ThreeTimes

GAPS = (0, 32, 128, 512, 1024, 2048, 4096)

# The layer as it was published and as this project had it before, with its own initialisation of W0.
PUBLISHED: Mapping[str, Any] = {
    "base_lr": 0.1,
    "base_lr_scale": "published",
    "key_shift": 0,
    "tied_start": False,
}
ONE_RATE: Mapping[str, Any] = {"weight_lr_multiplier": 1.0, "alpha_lr_multiplier": 1.0}


@dataclass(frozen=True)
class Plan:
    """A run to make, seeds apart."""

    arm: Arm
    task: Task
    gaps: tuple[int, ...] = ()


def _recall() -> list[Arm]:
    shift, tie = {"key_shift": 0}, {"tied_start": False}
    rate = {"base_lr": 0.1, "base_lr_scale": "published"}
    return [
        Arm("full", "attention to everything, no TTT", None, window=3 * PERIOD),
        Arm("window", "window alone", None),
        Arm("wider", "window, wider feed-forward with as many parameters", None, as_many_parameters=True),
        Arm("frozen", "TTT, fast weights frozen at W0", frozen=True),
        Arm("published", "TTT as published: no shift, no tie, `base_lr` 0.1", PUBLISHED),
        Arm("rate", "as published, with the inner rate of the defaults", {**shift, **tie}),
        Arm("rate-tie", "and keys that start as queries", shift),
        Arm("rate-shift", "and the key shift, without that start", tie),
        Arm("shift-tie", "key shift and tied start, with the published inner rate", rate),
        Arm("defaults", "**the defaults: key shift, tied start, inner rate in shares**"),
        Arm("one-rate", "the defaults, one outer rate for everything", ONE_RATE),
        Arm("slow-gates", "the defaults, gates at the rate of the base", {"alpha_lr_multiplier": 1.0}),
        Arm("ttt-only", "the defaults, base frozen", trained="ttt"),
        Arm("lora", "the defaults, base frozen but for LoRA adapters", trained="lora"),
        Arm("published-400", "as published, 400 steps", PUBLISHED, num_steps=400),
        Arm("defaults-400", "**the defaults, 400 steps**", num_steps=400),
    ]


def _retention() -> list[Plan]:
    plans = []
    for filler in ("other", "same"):
        for heads in (4, 1):
            arm = Arm(f"{filler}-{heads}x{64 // heads}", f"{heads} heads of {64 // heads}", heads=heads)
            plans.append(_with_gaps(arm, filler))
    base = {"base_lr": 0.1}, {"base_lr": 0.3}, {"base_lr": 3.0}
    for ttt in base:
        arm = Arm(f"same-1x64-rate{ttt['base_lr']:g}", f"`base_lr` {ttt['base_lr']:g}", _share(ttt), heads=1)
        plans.append(_with_gaps(arm, "same"))
    for decay in (0.003, 0.03):
        arm = Arm(f"same-1x64-decay{decay:g}", f"`state_decay` {decay:g}", {"state_decay": decay}, heads=1)
        plans.append(_with_gaps(arm, "same"))
    return plans


def _with_gaps(arm: Arm, filler: str) -> Plan:
    longest = 512 if filler == "other" else 1024
    arm = Arm(**{**vars(arm), "num_steps": 1500})
    return Plan(arm, AfterAGap(filler, longest), GAPS)  # type: ignore[arg-type]


def _share(ttt: Mapping[str, Any]) -> dict[str, Any]:
    return {**ttt, "base_lr_scale": "share"}


STUDIES: Mapping[str, list[Plan]] = {
    "recall": [Plan(arm, ThreeTimes()) for arm in _recall()],
    "retention": _retention(),
}
