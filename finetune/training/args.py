"""Every key of `optim:`."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from moshi_ttt.config import STRICT

_PCT_START, _PCT_DECAY = 0.05, 0.2


@dataclass(frozen=True, config=STRICT)
class OptimArgs:
    """`optim:` — AdamW and the schedule of its rates."""

    lr: float = Field(default=1e-4, gt=0, le=1e6, description="Peak learning rate of the group `base`.")
    depformer_lr_multiplier: float = Field(
        default=1.0,
        gt=0,
        le=1e9,
        description="Rate of the depth transformer's weights in the group `base`, relative to optim.lr.",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1e6, description="AdamW weight decay; never on the gates."
    )
    schedule: Literal["onecycle", "cosine", "wsd"] = Field(
        default="onecycle",
        description="After the warm-up: onecycle and cosine fall along half a cosine; wsd stays at the peak "
        "and falls in a straight line at the end.",
    )
    pct_start: float = Field(
        default=_PCT_START, gt=0, lt=1, description="Share of the steps spent warming up."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, le=10**9, description="Steps of warming up, in place of pct_start."
    )
    pct_decay: float = Field(
        default=_PCT_DECAY, gt=0, le=1, description="Share of the steps in which wsd falls, at the end."
    )
    decay_norms_and_biases: bool = Field(default=False, description="Decay norms and biases as well.")

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimArgs":
        if self.warmup_steps is not None and self.pct_start != _PCT_START:
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} and pct_start: {self.pct_start:g} both say how long the "
                "warm-up is; leave one of them out"
            )
        if self.schedule != "wsd" and self.pct_decay != _PCT_DECAY:
            raise ValueError(f"pct_decay: {self.pct_decay:g} belongs to schedule wsd, not {self.schedule}")
        return self

    def num_warmup_steps(self, max_steps: int) -> float:
        """Steps until the rates are at their peak, of a run of `max_steps`."""
        return self.pct_start * max_steps if self.warmup_steps is None else self.warmup_steps

    def num_decay_steps(self, max_steps: int) -> float:
        """Steps in which the rates of wsd fall."""
        return self.pct_decay * max_steps

    def check_steps(self, max_steps: int) -> None:
        """See that a run of `max_steps` has room for the warm-up and the fall.

        Raises:
            ValueError: it has not; names the dotted key.
        """
        if self.warmup_steps is not None and self.warmup_steps >= max_steps:
            raise ValueError(
                f"optim.warmup_steps: {self.warmup_steps} warm up of {max_steps} steps in all (max_steps); "
                "lower it"
            )
        warm_up, decay = self.num_warmup_steps(max_steps), self.num_decay_steps(max_steps)
        if self.schedule == "wsd" and warm_up + decay > max_steps * (1 + 1e-9):
            raise ValueError(
                f"optim.pct_decay: {self.pct_decay:g} of {max_steps} steps (max_steps) and a warm-up of "
                f"{warm_up:g} are more than there are; lower one of them"
            )
