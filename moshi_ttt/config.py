"""Architectural choices of a TTT layer, validated where they are made."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from moshi_ttt.backends import Backend

InnerRateScale = Literal["share", "published"]
# What a configuration that was recorded before there were these keys means.
BEFORE_THERE_WERE_KEYS: Mapping[str, Any] = {
    "key_shift": 0,
    "tied_start": False,
    "base_lr_scale": "published",
}

# Strict: "yes" is not a bool and 2.5 is not an int. Unknown keys are errors.
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InnerSettings:
    """What the inner loop needs to know beside its tensors, see `moshi_ttt.ops.ttt_mlp_with_states`."""

    mini_batch_size: int
    causal: bool = True
    eps: float = 1e-8
    inner_grad_clip: float | None = None
    state_decay: float | None = None
    backend: Backend = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TTTOptions:
    """Choices that a TTT layer and the `ttt:` section of a training configuration share."""

    mini_batch_size: int = Field(
        default=16, ge=1, le=65536, description="Tokens (frames of 80 ms) per inner mini-batch."
    )
    causal: bool = Field(
        default=True,
        description="A token reads only the inner steps of tokens up to itself. false leaks the future "
        "inside a mini-batch and cannot stream; for comparison with the published form only.",
    )
    ttt_mlp_layers: int = Field(
        default=2, ge=1, le=64, description="Layers of the inner MLP (1 is TTT-Linear)."
    )
    ttt_mlp_expansion_factor: float = Field(
        default=4.0, gt=0, le=1024, description="Hidden width of the inner MLP, as a multiple of head_dim."
    )
    ttt_mlp_hidden_dims: list[int] | tuple[int, ...] | None = Field(
        default=None,
        description="Hidden widths of the inner MLP (ttt_mlp_layers - 1 numbers); overrides the factor.",
    )
    key_shift: int = Field(
        default=1,
        ge=0,
        le=64,
        description="Frames between what a key sees and what its value sees: the memory learns what follows "
        "a frame. 0 is the published form: what a frame is.",
    )
    use_rope: bool = Field(
        default=False, description="Rotary positions on Q and K, position modulo mini_batch_size."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary frequencies.")
    pre_norm: bool = Field(default=True, description="RMSNorm before the TTT projections.")
    backend: Backend = Field(
        default="auto",
        description="How the operator runs: autograd; manual (backward by hand, faster and in less memory); "
        "compiled (the same with torch.compile); fused (Triton kernels); auto: fused or else compiled on a "
        "GPU, manual elsewhere.",
    )
    inner_init: Literal["unit_variance", "published"] = Field(
        default="unit_variance",
        description="Weights at start. unit_variance: inner layers N(0, 1) then N(0, 1/fan_in), projections "
        "N(0, 1/dim); published: N(0, 0.02^2) throughout.",
    )
    tied_start: bool = Field(
        default=True,
        description="The projection of keys starts as a copy of that of queries, so that a query finds what "
        "was stored under a like key from the first step on.",
    )
    base_lr_scale: InnerRateScale = Field(
        default="share",
        description="What the inner learning rate is a multiple of. share: 1 is the rate at which a token "
        "corrects all of its own error, whatever head_dim, mini_batch_size and depth. published: "
        "1 / head_dim / mini_batch_size, meant where base_lr is given without this key.",
    )
    gating: Literal["residual", "blend"] = Field(
        default="residual",
        description="residual: x + tanh(alpha) TTT(x); blend: (1 - tanh(alpha)) x + tanh(alpha) TTT(x).",
    )
    gating_trainable: bool = Field(default=True, description="false fixes the gate at its initial value.")
    eps: float = Field(default=1e-8, gt=0, description="Epsilon of the inner LayerNorm (float32).")
    inner_grad_clip: float | None = Field(
        default=None, gt=0, description="Largest norm of one token's inner gradient at the MLP's output."
    )
    state_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the learned change (W - W0) that is forgotten after each full mini-batch.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_the_scale_of_a_bare_rate(cls, given: Any) -> Any:
        """Configurations from before there were scales give a rate alone, and mean the published one."""
        kwargs = given.kwargs if isinstance(given, ArgsKwargs) else None
        if kwargs and kwargs.keys() & {"base_lr", "ttt_base_lr"} and "base_lr_scale" not in kwargs:
            return ArgsKwargs(given.args, {**kwargs, "base_lr_scale": "published"})
        return given

    @model_validator(mode="after")
    def _check_hidden_dims(self) -> "TTTOptions":
        dims = self.ttt_mlp_hidden_dims
        if dims is None:
            return self
        if len(dims) != self.ttt_mlp_layers - 1 or any(not 1 <= dim <= 1_000_000 for dim in dims):
            raise ValueError(
                f"ttt_mlp_hidden_dims: {list(dims)} does not fit, an inner MLP of {self.ttt_mlp_layers} "
                f"layers has {self.ttt_mlp_layers - 1} hidden widths, each at least 1"
            )
        return self

    @property
    def inner(self) -> InnerSettings:
        """The choices that the inner loop needs."""
        names = (field.name for field in dataclasses.fields(InnerSettings))
        return InnerSettings(**{name: getattr(self, name) for name in names})

    def inner_dims(self, head_dim: int) -> list[int]:
        """Widths of the inner MLP from input to output, `ttt_mlp_layers + 1` numbers."""
        hidden = self.ttt_mlp_hidden_dims
        if hidden is None:
            width = max(1, round(self.ttt_mlp_expansion_factor * head_dim))
            hidden = [width] * (self.ttt_mlp_layers - 1)
        return [head_dim, *hidden, head_dim]


@dataclass(frozen=True, config=STRICT)
class TTTConfig(TTTOptions):
    """Everything that defines one TTT layer. Defaults are those of Moshi 7B."""

    model_dim: int = Field(default=4096, ge=1, description="Width of the transformer.")
    num_heads: int = Field(default=32, ge=1, description="Heads; each has its own inner MLP.")
    ttt_base_lr: float = Field(default=1.0, gt=0, description="Inner learning rate before sigmoid and scale.")
    gating_alpha_init: float = Field(default=0.005, description="Gate parameter alpha at start.")

    @model_validator(mode="after")
    def _check_dims(self) -> "TTTConfig":
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} is not a multiple of num_heads {self.num_heads}")
        if self.use_rope and self.head_dim % 2:
            raise ValueError(f"use_rope needs an even head_dim, {self.head_dim} is odd")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.model_dim // self.num_heads

    @property
    def inner_rate_unit(self) -> float:
        """The inner rate of a token where `ttt_base_lr` and its sigmoid are 1, see `base_lr_scale`.

        A step of rate r changes what the last inner layer answers to the same token by `r (|X|^2 + 1)` times
        the gradient there, X its input. `share` divides by what `|X|^2 + 1` is at the start, in expectation
        (normalised least mean squares); the first layers' shares are smaller, as their inputs are.
        """
        if self.base_lr_scale == "published":
            return 1 / self.head_dim / self.mini_batch_size
        return 1 / (1 + self._expected_input_square())

    def _expected_input_square(self) -> float:
        """`|X|^2` of the last inner layer at the start, with `unit_variance`: keys have norm 1."""
        mean_square = 1.0  # of the first layer's pre-activations: N(0, 1) weights, keys of norm 1
        hidden = self.inner_dims(self.head_dim)[1:-1]
        for _ in hidden:
            mean_square = gelu_mean_square(mean_square)
        return hidden[-1] * mean_square if hidden else 1.0


@lru_cache
def gelu_mean_square(variance: float) -> float:
    """`E[gelu(z)^2]` of a normal z with mean 0, by the trapezoidal rule."""
    std, step = math.sqrt(variance), 0.01
    total = 0.0
    for number in range(-800, 801):
        unit = number * step
        z = std * unit
        gelu = 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        total += gelu**2 * math.exp(-0.5 * unit**2)
    return total * step / math.sqrt(2 * math.pi)
