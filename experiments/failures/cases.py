"""The cases: what is changed in a healthy training, and which failures the monitor must find."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from finetune.training import parallel
from moshi_ttt.hybrid_layer import HybridStreamingTransformerLayer
from moshi_ttt.hybrid_model import hybrid_layers
from moshi_ttt.ttt_layer import TTTLayer

_Sections = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        title: for tables.
        expected: names of the findings, no more and no less.
        changes: of the configuration, section by section.
        broken: what is put into the model's code while it trains.
        shows: the quantity by which it is seen, for the figure.
    """

    title: str
    expected: frozenset[str] = frozenset()
    changes: _Sections = field(default_factory=dict)
    broken: Callable[[], AbstractContextManager[Any]] = nullcontext
    shows: str | None = None


@contextmanager
def without_normalisation() -> Iterator[None]:
    """Keys, targets and outputs stay as they come, as when a helper returns its second argument."""

    def same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def raw_target(self: TTTLayer, k: Tensor, v: Tensor) -> Tensor:
        return v

    with (
        patch("moshi_ttt.ttt_layer.F.normalize", same),
        patch.object(TTTLayer, "reconstruction_target", raw_target),
    ):
        yield


@contextmanager
def _built_with(change: Callable[[HybridStreamingTransformerLayer], None]) -> Iterator[None]:
    """Models whose TTT layers are changed as soon as they are built."""
    build = parallel.build_model

    def build_changed(*args: Any, **kwargs: Any) -> LMModel:
        model = build(*args, **kwargs)
        for layer in hybrid_layers(model).values():
            change(layer)
        return model

    with patch.object(parallel, "build_model", build_changed):
        yield


def gates_in_bfloat16() -> AbstractContextManager[None]:
    """Gates without float32 masters."""

    def round_gate(layer: HybridStreamingTransformerLayer) -> None:
        gate = layer.forward_ssm_gating.gating_alpha
        gate.data = gate.data.to(torch.bfloat16)

    return _built_with(round_gate)


def post_norm_of(weight: float) -> Callable[[], AbstractContextManager[None]]:
    """The norm behind the inner network starts at this weight instead of 1."""

    def fill(layer: HybridStreamingTransformerLayer) -> None:
        layer.ttt.post_norm.weight.data.fill_(weight)

    return lambda: _built_with(fill)


@contextmanager
def inner_steps_uphill() -> Iterator[None]:
    """The inner loop climbs its loss, as with a wrong sign."""
    inner_rate = TTTLayer.inner_rate

    def reversed_rate(self: TTTLayer, x: Tensor) -> Tensor:
        return -inner_rate(self, x)

    with patch.object(TTTLayer, "inner_rate", reversed_rate):
        yield


def _published_rate(base_lr: float) -> dict[str, Any]:
    return {"base_lr": base_lr, "base_lr_scale": "published"}


CASES: dict[str, Case] = {
    "healthy": Case("the settings of the quickstart"),
    "one_rate_low": Case(
        "one outer rate, 3e-7",
        frozenset({"gate frozen"}),
        {"optim": {"lr": 3e-7}, "ttt": {"alpha_lr_multiplier": 1}},
        shows="gate_speed",
    ),
    "one_rate_high": Case(
        "one outer rate, 0.3",
        frozenset({"steps too large"}),
        {"optim": {"lr": 0.3}, "ttt": {"alpha_lr_multiplier": 1}},
        shows="update_ratio",
    ),
    "ttt_rate_low": Case(
        "rate of the TTT weights 2e-11",
        frozenset({"steps too small"}),
        {"ttt": {"weight_lr_multiplier": 1e-8}},
        shows="update_ratio",
    ),
    "gate_rate_high": Case(
        "rate of the gates 2.0, warm-up half of the run",
        frozenset({"gate open too early"}),
        {"optim": {"pct_start": 0.5}, "ttt": {"alpha_lr_multiplier": 1000}},
        shows="gate_opening",
    ),
    "loud_post_norm": Case(
        "post-norm starts at 600",
        frozenset({"output amplified"}),
        {"ttt": {"alpha_lr_multiplier": 0.1}},
        broken=post_norm_of(600.0),
        shows="ttt_amplification",
    ),
    "loud_open_gate": Case(
        "gates start at alpha = 2, post-norm at 20",
        frozenset({"TTT drowns attention"}),
        {"ttt": {"initial_gating_alpha": 2.0}},
        post_norm_of(20.0),
        shows="ttt_over_attention",
    ),
    "base_lr_1": Case("carried memory, `base_lr: 1.0`", changes={"ttt": _published_rate(1.0)}),
    "base_lr_1000": Case(
        "carried memory, `base_lr: 1000`",
        frozenset({"fast weights explode"}),
        {"ttt": _published_rate(1000.0)},
        shows="fast_weight_change",
    ),
    "inner_ascent": Case(
        "inner steps in the wrong direction",
        frozenset({"inner loss does not fall"}),
        broken=inner_steps_uphill,
        shows="inner_gain",
    ),
    "broken_normalisation": Case(
        "keys and targets not normalised",
        frozenset({"normalisation broken"}),
        broken=without_normalisation,
        shows="key_norm_max",
    ),
    "non_causal": Case("`causal: false`", frozenset({"future leaks"}), {"ttt": {"causal": False}}),
    "bfloat16_gate": Case(
        "gates stored in bfloat16, steps of 2e-5",
        frozenset({"gate cannot move"}),
        {"ttt": {"initial_gating_alpha": 0.05, "alpha_lr_multiplier": 0.01}},
        gates_in_bfloat16,
        shows="gate_movable",
    ),
}
