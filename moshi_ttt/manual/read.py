"""What the queries of a group of mini-batches read, and the way back: products over all tokens at once.

A query reads the fast weights `W` at the start of the group less the steps of the group as far as it may see
them, with `A_l = tril(Y_l X_l^T + 1)`:

    Zq_l = Y_l W_l + b_l - A_l s_l      Y_0 = Q, Y_{l+1} = phi(Zq_l)      out = Q + LN(Zq_last)

    dA_l = -tril(dZq_l s_l^T)           dY_l = dZq_l W_l^T + dA_l X_l     dZq_{l-1} = dY_l phi'(Zq_{l-1})
    ds_l = -A_l^T dZq_l                 dX_l = dA_l^T Y_l                 dW_l = Y_l^T dZq_l

Shapes: as in `scan`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moshi_ttt.manual.elementwise import Elementwise, normalise
from moshi_ttt.manual.scan import Network, Norm, Steps, gram


def visible(num_tokens: int, mini_batch_size: int, *, causal: bool, like: Tensor) -> Tensor:
    """1 where a query (row) sees a token (column) of its group, else 0, `[L, L]`.

    It sees those up to itself, or, not causal, up to the end of its mini-batch. The dtype is that of `like`.
    """
    order = torch.arange(num_tokens, device=like.device)
    if not causal:
        order = order // mini_batch_size
    return (order[:, None] >= order[None, :]).to(like.dtype)


class Reading:
    """The queries of one group.

    Args:
        q: `[R, L, D]`.
        own: what the tokens of the group add.
        fast: fast weights at its start.
        sees: see `visible`.
        zq: what the queries read at each layer, `[R, L, out_l]`; written by `answer`, read by `back`.
        functions: eager or compiled.
    """

    def __init__(
        self,
        q: Tensor,
        own: Steps,
        fast: Network,
        sees: Tensor,
        zq: Sequence[Tensor],
        functions: Elementwise,
    ) -> None:
        self.q, self.own, self.fast, self.sees, self.zq = q, own, fast, sees, zq
        self.functions = functions

    def _inputs(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the queries put into a layer, and its attention."""
        y = self.q
        if layer:
            y = torch.empty_like(self.zq[layer - 1])
            self.functions.activate(self.zq[layer - 1], y)
        return y, gram(y, 1, self.own.inputs[layer]).mul_(self.sees)

    def answer(self, norm: Norm, eps: float, out: Tensor) -> None:
        """The answers into out, `[R, L, D]`."""
        for layer, (zq, weight, bias, steps) in enumerate(
            zip(self.zq, *self.fast, self.own.steps, strict=True)
        ):
            y, attention = self._inputs(layer)
            torch.baddbmm(bias, y, weight, out=zq).baddbmm_(attention, steps, alpha=-1)
        normed, _, _ = normalise(self.zq[-1], eps)
        torch.add(normed.mul_(norm.weight).add_(norm.bias), self.q, out=out)

    def back(
        self, dout: Tensor, norm: Norm, eps: float, gradients: Steps, dfast: Network, dnorm: Norm
    ) -> Tensor:
        """Gradient of the queries, `[R, L, D]`; those of all else are added to what is there.

        Args:
            dout: gradient of the answers, `[R, L, D]`.
            norm, eps: of the LayerNorm.
            gradients: of what the tokens add.
            dfast: of the fast weights at the start.
            dnorm: of the LayerNorm.
        """
        dz = self.functions.through_output_norm(dout, self.zq[-1], norm.weight, eps, *dnorm)
        for layer in reversed(range(len(self.zq))):
            y, attention = self._inputs(layer)
            x, steps = self.own.inputs[layer], self.own.steps[layer]
            dattention = torch.bmm(dz, steps.mT).mul_(self.sees)  # negative
            gradients.steps[layer].baddbmm_(attention.mT, dz, alpha=-1)
            gradients.inputs[layer].baddbmm_(dattention.mT, y, alpha=-1)
            dfast.weights[layer].baddbmm_(y.mT, dz)
            dfast.biases[layer].add_(dz.sum(1, keepdim=True))
            dz = torch.bmm(dz, self.fast.weights[layer].mT).baddbmm_(dattention, x, alpha=-1)
            if layer:
                self.functions.through_gelu(dz, self.zq[layer - 1], dz)
        return dz.add_(dout)
