"""What the arms are trained on: sequences whose far past matters.

Shapes: B sequences, T tokens or frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor


class Task(Protocol):
    """Sequences, and how well a model predicts them."""

    @property
    def name(self) -> str:
        """Of the task."""
        ...

    @property
    def window(self) -> int:
        """Attention window of the short arms."""
        ...

    @property
    def scored(self) -> Tensor:
        """Positions that cannot be told from what the window shows, `[T]`, bool."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the sequences, for the file of a run."""
        ...

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Arguments of `LMModel`, the attention window left out."""
        ...

    def batch(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """Fresh sequences, codes `[B, 1 + n_q, T]`."""
        ...

    def losses(self, lm: LMModel, codes: Tensor) -> Tensor:
        """Loss of every position in nats, `[B, T]`."""
        ...


def transformer_settings(dim: int, num_heads: int, num_layers: int) -> dict[str, Any]:
    """Moshi's own kind of transformer in another size: arguments of `LMModel`."""
    return {
        "dim": dim,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "hidden_scale": 4.125,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
    }


@dataclass
class PatternTask:
    """A random pattern that repeats; each sequence has a pattern of its own, which cannot be known by heart.

    Attributes:
        num_symbols: of which the pattern is drawn.
        period: length of the pattern, tokens.
        num_tokens: length of a sequence.
        window: see `Task`. Attention reaches at most window * num_layers tokens back.
        dim, num_heads, num_layers: of the transformer.
    """

    num_symbols: int = 48
    period: int = 64
    num_tokens: int = 192
    window: int = 16
    dim: int = 64
    num_heads: int = 4
    num_layers: int = 3
    name: str = "pattern"

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Task`."""
        return vars(self)

    @property
    def scored(self) -> Tensor:
        """All positions after the first period."""
        return torch.arange(self.num_tokens) >= self.period

    @property
    def model_settings(self) -> Mapping[str, Any]:
        """Moshi's transformer on the text stream alone, without audio and depth transformer."""
        return {
            "n_q": 0,
            "dep_q": 0,
            "delays": [0],
            "text_card": self.num_symbols,
            **transformer_settings(self.dim, self.num_heads, self.num_layers),
        }

    def batch(self, size: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """See `Task`; every sequence is new, so there is no need to hold any out."""
        pattern = torch.randint(self.num_symbols, (size, 1, self.period), generator=generator)
        repeats = -(-self.num_tokens // self.period)
        return pattern.repeat(1, 1, repeats)[:, :, : self.num_tokens]

    def losses(self, lm: LMModel, codes: Tensor) -> Tensor:
        """See `Task`."""
        initial = torch.full_like(codes[:, :, :1], lm.text_initial_token_id)
        _, logits = lm.forward_text(torch.cat([initial, codes[:, :, :-1]], 2))
        return F.cross_entropy(logits[:, 0].mT.float(), codes[:, 0], reduction="none")
