"""The TTT-MLP as an operator over sequences: any length, any split, in the dual form of `inner_loop`.

Shapes: B batch rows, H heads, T tokens, D head_dim.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moshi_ttt.backends import Backend
from moshi_ttt.config import InnerSettings
from moshi_ttt.inner_loop import InnerLoop, InnerNetwork, TTTState, compute_dtype

__all__ = ["TTTState", "inner_losses", "ttt_mlp", "ttt_mlp_with_states"]


def ttt_mlp(
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
    **settings: Any,
) -> Float[Tensor, "B H T D"]:
    """Outputs of the TTT-MLP over a sequence that starts at `W0`.

    Arguments and settings (`causal`, `eps`, …) are those of `ttt_mlp_with_states`.
    """
    tokens = (xq, xk, xv, eta)
    network = (weights, biases, ln_weight, ln_bias)
    return ttt_mlp_with_states(*tokens, *network, mini_batch_size=mini_batch_size, **settings)[0]


def ttt_mlp_with_states(
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
    backend: Backend = "auto",
    state: TTTState | None = None,
) -> tuple[Float[Tensor, "B H T D"], TTTState]:
    """One inner gradient step per token, read back by the same token's query.

    Computes in at least float32 (float64 stays float64), with autocast switched off. The definition is
    `moshi_ttt.reference.ttt_mlp_reference`; splitting a sequence anywhere and carrying the state gives
    the same outputs, final state and gradients.

    Args:
        xq, xk, xv: `[B, H, T, D]`, any T >= 1.
        eta: inner learning rate of each token, every scale included, `[B, H, T]`. A token with eta 0
            teaches nothing (padding).
        weights, biases: `W0`, layer l: `[H, in, out]` and `[H, 1, out]`, one layer or more.
        ln_weight, ln_bias: inner LayerNorm, `[H, D]`.
        mini_batch_size: tokens per inner mini-batch.
        causal: token i reads the steps of tokens j <= i of its mini-batch; otherwise of all of them.
        eps: epsilon of the LayerNorm, added to the biased variance.
        inner_grad_clip: largest norm of a token's gradient at the MLP's output.
        state_decay: share of `W - W0` that is forgotten after each full mini-batch.
        backend: see `moshi_ttt.backends`; only `autograd` has second derivatives.
        state: where an earlier part of the sequence ended; None starts at `W0`. It is not modified.

    Returns:
        Outputs `[B, H, T, D]` in the dtype of xq, and the state after the last token.

    Raises:
        ValueError: the state stands inside a mini-batch and `causal` is False.
    """
    settings = InnerSettings(
        mini_batch_size=mini_batch_size,
        causal=causal,
        eps=eps,
        inner_grad_clip=inner_grad_clip,
        state_decay=state_decay,
        backend=backend,
    )
    network = InnerNetwork(tuple(weights), tuple(biases), ln_weight, ln_bias)
    inner = InnerLoop(network, settings, dtype=compute_dtype(xq))
    out, state = inner.run((xq, xk, xv, eta), state)
    return out.to(xq.dtype), state


def inner_losses(
    xk: Float[Tensor, "B H T D"],
    xv: Float[Tensor, "B H T D"],
    eta: Float[Tensor, "B H T"],
    weights: Sequence[Float[Tensor, "H _ _"]],
    biases: Sequence[Float[Tensor, "H 1 _"]],
    ln_weight: Float[Tensor, "H D"],
    ln_bias: Float[Tensor, "H D"],
    *,
    start: TTTState | None = None,
    **settings: Any,
) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
    """Inner loss of every token at `W0`, just before its own step and just after it.

    A diagnostic: no gradients, causal, arguments and settings as `ttt_mlp`.

    Args:
        start: where an earlier part of the sequence ended, anywhere in a mini-batch; None: at `W0`.

    Returns:
        Three tensors `[B, H, T]`: at `W0`, before, after.
    """
    network = InnerNetwork(tuple(weights), tuple(biases), ln_weight, ln_bias)
    inner = InnerLoop(network, InnerSettings(**settings), dtype=compute_dtype(xk))
    return inner.losses(xk, xv, eta, start)
