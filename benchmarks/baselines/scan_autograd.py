"""The published TTT-MLP as plainly as it can be written: a scan of mini-batches, differentiated by autograd.

The algorithm of Sun et al. 2024 ("Learning to (Learn at Test Time)") in the form in which Dalal et al. 2025
("One-Minute Video Generation with Test-Time Training") train it in PyTorch: the dual form with the inner
learning rates as a matrix beside the attention, every derivative written out in elementwise operations, the
fast weights made anew in each mini-batch, and gradient checkpointing over groups of mini-batches. The
published form is not causal inside a mini-batch; `causal=True` keeps the lower triangle of the rates.

Shapes: B batch rows, H heads, T tokens, C mini_batch_size, D head_dim.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Carry = tuple[list[Tensor], list[Tensor]]  # fast weights and biases


def scan_ttt_mlp(
    xq: Tensor,
    xk: Tensor,
    xv: Tensor,
    eta: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    mini_batch_size: int,
    causal: bool = False,
    eps: float = 1e-8,
    checkpoint_group_size: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs `[B, H, T, D]` and the fast weights and biases after the last token.

    Args:
        xq, xk, xv, eta, weights, biases, ln_weight, ln_bias: as `moshi_ttt.ops.ttt_mlp`.
        mini_batch_size: C; the last mini-batch may be shorter.
        causal: False as published.
        eps: of the LayerNorm.
        checkpoint_group_size: mini-batches that are recomputed together in backward; 0: nothing is.
    """
    batch_size = xq.shape[0]
    carry: Carry = (
        [w.expand(batch_size, *w.shape) for w in weights],
        [b.expand(batch_size, *b.shape) for b in biases],
    )
    mini_batches = list(zip(*(x.split(mini_batch_size, 2) for x in (xq, xk, xv, eta)), strict=True))
    step = partial(
        _mini_batch, ln_weight=ln_weight[:, None], ln_bias=ln_bias[:, None], causal=causal, eps=eps
    )
    outputs = []
    for start in range(0, len(mini_batches), checkpoint_group_size or len(mini_batches)):
        if checkpoint_group_size:
            group = mini_batches[start : start + checkpoint_group_size]
            out, carry = checkpoint(_scan, step, group, carry, use_reentrant=False)
        else:
            out, carry = _scan(step, mini_batches, carry)
        outputs.append(out)
    return torch.cat(outputs, 2), *carry


def _scan(
    step: Callable[..., tuple[Tensor, Carry]], mini_batches: Sequence[tuple[Tensor, ...]], carry: Carry
) -> tuple[Tensor, Carry]:
    outputs = []
    for mini_batch in mini_batches:
        out, carry = step(*mini_batch, carry)
        outputs.append(out)
    return torch.cat(outputs, 2), carry


def _mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    carry: Carry,
    *,
    ln_weight: Tensor,
    ln_bias: Tensor,
    causal: bool,
    eps: float,
) -> tuple[Tensor, Carry]:
    weights, biases = carry
    last = len(weights) - 1
    inputs, zs = [k], []
    for layer in range(len(weights)):
        zs.append(inputs[layer] @ weights[layer] + biases[layer])
        if layer < last:
            inputs.append(F.gelu(zs[layer], approximate="tanh"))
    gradients = [_layer_norm_l2_gradient(zs[last], v - k, ln_weight, ln_bias, eps)]
    for layer in reversed(range(last)):
        gradients.insert(0, gradients[0] @ weights[layer + 1].mT * _gelu_derivative(zs[layer]))

    rates = eta[:, :, None, :].expand(*eta.shape, eta.shape[-1])  # [B, H, C, C], reader by step
    if causal:
        rates = rates.tril()
    x = q
    for layer in range(len(weights)):
        if layer > 0:
            x = F.gelu(x, approximate="tanh")
        attention = x @ inputs[layer].mT
        bias = biases[layer] - rates @ gradients[layer]
        x = x @ weights[layer] - (rates * attention) @ gradients[layer] + bias

    steps = eta[..., None]
    new_weights = [w - (steps * x).mT @ g for w, x, g in zip(weights, inputs, gradients, strict=True)]
    new_biases = [b - (steps * g).sum(2, keepdim=True) for b, g in zip(biases, gradients, strict=True)]
    return q + _layer_norm(x, ln_weight, ln_bias, eps), (new_weights, new_biases)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    return weight * ((x - x.mean(-1, keepdim=True)) / std) + bias


def _layer_norm_l2_gradient(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`d/dx 0.5 * ||LN(x) - target||^2`."""
    dim = x.shape[-1]
    std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + eps)
    normed = (x - x.mean(-1, keepdim=True)) / std
    g = (weight * normed + bias - target) * weight
    total = dim * g - g.sum(-1, keepdim=True) - normed * (g * normed).sum(-1, keepdim=True)
    return total / (dim * std)


def _gelu_derivative(x: Tensor) -> Tensor:
    slope = sqrt(2 / pi)
    tanh = torch.tanh(slope * x * (1 + 0.044715 * x * x))
    return 0.5 * x * ((1 - tanh * tanh) * (slope + 3 * 0.044715 * slope * x * x)) + 0.5 * (1 + tanh)
