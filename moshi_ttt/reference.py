"""The definition of the TTT-MLP inner loop: token by token, gradients by automatic differentiation.

Slow and obviously right. `moshi_ttt.ops` computes the same numbers fast and is tested against this file.

Shapes: B batch rows, H heads, T tokens, D head_dim.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def _inner_mlp(
    x: Float[Tensor, "B H T _"],
    weights: Sequence[Float[Tensor, "B H _ _"]],
    biases: Sequence[Float[Tensor, "B H 1 _"]],
) -> Float[Tensor, "B H T _"]:
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index > 0:
            x = F.gelu(x, approximate="tanh")
        x = x @ weight + bias
    return x


def _head_layer_norm(
    x: Float[Tensor, "B H T D"], weight: Float[Tensor, "H D"], bias: Float[Tensor, "H D"], eps: float
) -> Float[Tensor, "B H T D"]:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight[:, None] + bias[:, None]


@torch.enable_grad()
def _token_step(
    k: Float[Tensor, "B H 1 D"],
    v: Float[Tensor, "B H 1 D"],
    eta: Float[Tensor, "B H 1 1"],
    params: Sequence[Float[Tensor, "B H _ _"]],
    layer_norm: Callable[[Tensor], Tensor],
    clip: float | None,
) -> list[Float[Tensor, "B H _ _"]]:
    """`eta` times the gradient of one token's inner loss; k, v `[B, H, 1, D]`, eta `[B, H, 1, 1]`."""
    # A leaf given without a gradient could not be differentiated.
    params = [p if p.requires_grad else p.detach().requires_grad_() for p in params]
    num_layers = len(params) // 2
    z = _inner_mlp(k, params[:num_layers], params[num_layers:])
    loss = 0.5 * ((layer_norm(z) - (v - k)) ** 2).sum()
    if clip is not None:
        (at_output,) = torch.autograd.grad(loss, z, create_graph=True)
        eta = eta * (clip / at_output.norm(dim=-1, keepdim=True)).clamp(max=1.0)
    return [eta * g for g in torch.autograd.grad(loss, params, create_graph=True)]


def ttt_mlp_reference(
    xq: Float[Tensor, "B H T D"],
    xk: Float[Tensor, "B H T D"],
    xv: Float[Tensor, "B H T D"],
    eta: Float[Tensor, "B H T"],
    weights: Sequence[Float[Tensor, "H _ _"]],
    biases: Sequence[Float[Tensor, "H 1 _"]],
    ln_weight: Float[Tensor, "H D"],
    ln_bias: Float[Tensor, "H D"],
    *,
    mini_batch_size: int,
    causal: bool = True,
    eps: float = 1e-8,
    inner_grad_clip: float | None = None,
    state_decay: float | None = None,
) -> tuple[Float[Tensor, "B H T D"], list[Float[Tensor, "B H _ _"]], list[Float[Tensor, "B H 1 _"]]]:
    """One inner gradient step per token on `0.5 * ||LN(mlp(k)) - (v - k)||^2`.

    The gradient of every token of a mini-batch is taken at the fast weights the mini-batch started from
    (Sun et al. 2024, "Learning to (Learn at Test Time)", the dual form's primal).

    Args:
        xq, xk, xv: `[B, H, T, D]`.
        eta: inner learning rate of each token, every scale included, `[B, H, T]`.
        weights, biases: initial fast weights, layer l: `[H, in, out]` and `[H, 1, out]`.
        ln_weight, ln_bias: inner LayerNorm, `[H, D]`.
        mini_batch_size: tokens per inner mini-batch.
        causal: token i reads the steps of tokens j <= i of its mini-batch; otherwise of all of them.
        eps: epsilon of the LayerNorm.
        inner_grad_clip: largest norm of a token's gradient at the MLP's output.
        state_decay: share of `W - W0` that is forgotten after each full mini-batch.

    Returns:
        Outputs `[B, H, T, D]` and the fast weights and biases after the last token, `[B, H, ...]`.
    """
    batch_size, _, num_tokens, _ = xq.shape
    initial = [p.expand(batch_size, *p.shape) for p in (*weights, *biases)]
    num_layers, clip = len(weights), inner_grad_clip
    layer_norm = partial(_head_layer_norm, weight=ln_weight, bias=ln_bias, eps=eps)
    params = initial
    outputs: list[Tensor] = []
    for start in range(0, num_tokens, mini_batch_size):
        tokens = range(start, min(start + mini_batch_size, num_tokens))
        steps = [
            _token_step(xk[:, :, [j]], xv[:, :, [j]], eta[:, :, [j], None], params, layer_norm, clip)
            for j in tokens
        ]
        after = params
        if not causal:
            after = [p - sum(s[i] for s in steps) for i, p in enumerate(params)]
        for i, step in zip(tokens, steps, strict=True):
            if causal:
                after = [p - s for p, s in zip(after, step, strict=True)]
            z = _inner_mlp(xq[:, :, [i]], after[:num_layers], after[num_layers:])
            outputs.append(xq[:, :, [i]] + layer_norm(z))
        params = after
        if state_decay is not None and len(tokens) == mini_batch_size:
            params = [p0 + (1 - state_decay) * (p - p0) for p0, p in zip(initial, params, strict=True)]
    return torch.cat(outputs, 2), list(params[:num_layers]), list(params[num_layers:])


def shift_keys_reference(
    keys: Float[Tensor, "B H T D"], is_heard: Bool[Tensor, "B T"], *, key_shift: int
) -> tuple[Float[Tensor, "B H T D"], Bool[Tensor, "B T"]]:
    """Keys of the frames that were heard `key_shift` frames earlier, in a recording from its start.

    Args:
        keys: of the frames, `[B, H, T, D]`.
        is_heard: False where a frame is padding, `[B, T]`: it is nobody's predecessor.
        key_shift: frames between what the key sees and what the value sees.

    Returns:
        The shifted keys, 0 where there is no such frame, and where there is one, `[B, T]`; the others teach
        nothing.
    """
    shifted, exists = torch.zeros_like(keys), torch.zeros_like(is_heard)
    for row in range(len(keys)):
        earlier: list[int] = []
        for frame in range(keys.shape[2]):
            candidates = [*earlier, frame]
            if len(candidates) > key_shift:
                shifted[row, :, frame] = keys[row, :, candidates[-1 - key_shift]]
                exists[row, frame] = True
            if is_heard[row, frame]:
                earlier.append(frame)
    return shifted, exists
