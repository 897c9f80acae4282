"""Architectural choices of a TTT layer, validated where they are made."""

import dataclasses
from typing import Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from moshi_ttt.backends import Backend

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
    use_rope: bool = Field(
        default=False, description="Rotary positions on Q and K, position modulo mini_batch_size."
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="Base of the rotary frequencies.")
    pre_norm: bool = Field(default=True, description="RMSNorm before the TTT projections.")
    backend: Backend = Field(
        default="auto",
        description="How the operator runs: autograd; manual (backward by hand, faster and in less memory); "
        "compiled (the same with torch.compile); auto: compiled on a GPU, manual elsewhere.",
    )
    inner_init: Literal["unit_variance", "published"] = Field(
        default="unit_variance",
        description="Weights at start. unit_variance: inner layers N(0, 1) then N(0, 1/fan_in), projections "
        "N(0, 1/dim); published: N(0, 0.02^2) throughout.",
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
    ttt_base_lr: float = Field(default=0.1, gt=0, description="Inner learning rate before sigmoid and scale.")
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
