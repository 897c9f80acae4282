"""Random inputs of the TTT operator."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_ttt import backends
from moshi_ttt.config import TTTConfig
from moshi_ttt.ttt_layer import TTTLayer

MINI_BATCH_SIZE = 4


class TTTInputs(NamedTuple):
    """Arguments of `ttt_mlp` in order."""

    xq: Tensor
    xk: Tensor
    xv: Tensor
    eta: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    ln_weight: Tensor
    ln_bias: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, flat."""
        return [*self[:4], *self.weights, *self.biases, *self[6:]]

    def cut(self, start: int, stop: int) -> "TTTInputs":
        """Tokens start to stop."""
        tokens = (x[:, :, start:stop] for x in self[:4])
        return TTTInputs(*tokens, *self[4:])


def make_inputs(
    *,
    batch_size: int = 2,
    num_heads: int = 2,
    num_tokens: int = 11,
    head_dim: int = 6,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
    seed: int = 0,
) -> TTTInputs:
    """Unit keys and queries, an inner rate large enough that learning shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = (batch_size, num_heads, num_tokens, head_dim)
    dims = [head_dim, *[2 * head_dim] * (num_layers - 1), head_dim]
    inputs = TTTInputs(
        F.normalize(normal(*tokens), dim=-1),
        F.normalize(normal(*tokens), dim=-1),
        normal(*tokens),
        0.1 * torch.rand(*tokens[:3], generator=generator, dtype=torch.float64),
        [normal(num_heads, i, o) / i**0.5 for i, o in pairwise(dims)],
        [0.1 * normal(num_heads, 1, o) for o in dims[1:]],
        1 + 0.1 * normal(num_heads, head_dim),
        0.1 * normal(num_heads, head_dim),
    )

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_(requires_grad)

    return TTTInputs(
        *(leaf(x) for x in inputs[:4]),
        [leaf(w) for w in inputs.weights],
        [leaf(b) for b in inputs.biases],
        leaf(inputs.ln_weight),
        leaf(inputs.ln_bias),
    )


def make_layer(**settings: Any) -> TTTLayer:
    """A small TTT layer in float64 that learns visibly, for streaming; C is MINI_BATCH_SIZE."""
    torch.manual_seed(0)
    sizes = {"model_dim": 16, "num_heads": 2, "mini_batch_size": MINI_BATCH_SIZE}
    config = TTTConfig(**sizes, ttt_base_lr=5.0, **settings)
    return TTTLayer(config, dtype=torch.float64).eval().requires_grad_(False)


def needs_compiler(backend: str) -> Any:
    """The name of a backend as a test parameter, passed over where torch.compile finds no compiler."""
    missing = not backends._has_compiler("cpu")
    return pytest.param(backend, marks=pytest.mark.skipif(missing, reason="no C++ compiler"))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest value, within tolerance."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


def values_and_gradients(outputs: list[Tensor], inputs: TTTInputs) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for fixed random cotangents of the outputs."""
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    total = sum((x * c.to(x)).sum() for x, c in zip(outputs, cotangents, strict=True))
    return [*outputs, *torch.autograd.grad(total, inputs.tensors())]
