"""Random inputs of the TTT operator, distributed as those of a fresh TTT layer.

Shapes: B batch rows, H heads, T tokens, D head_dim, C mini_batch_size.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPANSION = 4
_BASE_LR = 0.1


class Size(NamedTuple):
    """The size of one problem; the inner MLP has two layers, D to 4 D to D."""

    batch_size: int
    num_heads: int
    head_dim: int
    mini_batch_size: int
    num_tokens: int

    @property
    def name(self) -> str:
        """In one word."""
        return "B{} H{} D{} C{} T{}".format(*self)

    @property
    def forward_flops(self) -> int:
        """Useful FLOPs of a forward pass, `B H T (56 D^2 + 20 C D)`; a backward pass has twice as many.

        A token takes 3 products with each of the first layer's weights (key, query, step) and 4 with each
        of the second's (and back), of `2 * 4 D^2` each, and reads C steps in both layers.
        """
        per_token = 56 * self.head_dim**2 + 20 * self.mini_batch_size * self.head_dim
        return self.batch_size * self.num_heads * self.num_tokens * per_token


class Inputs(NamedTuple):
    """The arguments of `ttt_mlp` in order, float32."""

    xq: Tensor  # [B, H, T, D], unit norm
    xk: Tensor  # [B, H, T, D], unit norm
    xv: Tensor  # [B, H, T, D]
    eta: Tensor  # [B, H, T]
    weights: list[Tensor]  # [H, D, 4 D], [H, 4 D, D]
    biases: list[Tensor]  # [H, 1, 4 D], [H, 1, D]
    ln_weight: Tensor  # [H, D]
    ln_bias: Tensor  # [H, D]

    def tensors(self) -> list[Tensor]:
        """All of them, flat: 4 tokens, weights, biases, LayerNorm."""
        return [*self[:4], *self.weights, *self.biases, *self[6:]]

    def cut(self, start: int, stop: int) -> "Inputs":
        """Tokens start to stop."""
        xq, xk, xv, eta = (x[:, :, start:stop] for x in self[:4])
        return Inputs(xq, xk, xv, eta, *self[4:])


def make_inputs(size: Size, device: torch.device, *, requires_grad: bool, seed: int = 0) -> Inputs:
    """Draw inputs; the same seed gives the same values on every device.

    Args:
        size: B, H, D, C, T.
        device: of the tensors.
        requires_grad: of all of them.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def leaf(x: Tensor) -> Tensor:
        return x.to(device).requires_grad_(requires_grad)

    heads, dim = size.num_heads, size.head_dim
    tokens = (size.batch_size, heads, size.num_tokens, dim)
    dims = [dim, EXPANSION * dim, dim]
    rate = _BASE_LR * torch.rand(tokens[:3], generator=generator) / dim / size.mini_batch_size
    return Inputs(
        leaf(F.normalize(normal(*tokens), dim=-1)),
        leaf(F.normalize(normal(*tokens), dim=-1)),
        leaf(normal(*tokens)),
        leaf(rate),
        [
            leaf(normal(heads, i, o) * (1.0 if index == 0 else i**-0.5))
            for index, (i, o) in enumerate(pairwise(dims))
        ],
        [leaf(torch.zeros(heads, 1, o)) for o in dims[1:]],
        leaf(torch.ones(heads, dim)),
        leaf(torch.zeros(heads, dim)),
    )
