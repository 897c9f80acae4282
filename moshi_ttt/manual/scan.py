"""What the keys of a group of mini-batches do to the fast weights: the key scan, forward.

Within a group the fast weights stay those of its start, `W_g`. A mini-batch reads what the ones before it
have changed the way queries do, from their steps:

    Z_l = X_l W_g - tril(X_l X_l^T + 1) s_l        u_l = s_{l+1} W_g^T - tril(s_{l+1} s_{l+1}^T) X_{l+1}

where `tril` keeps the mini-batches before one's own. So the weights move once in a group, by large products,
and only the products with `W_g` behind the first layer go mini-batch by mini-batch.

Shapes: R = batch rows times heads, L tokens of a group, C mini_batch_size, D head_dim; inner layer l maps
`in_l` to `out_l`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.config import InnerSettings
from moshi_ttt.manual.elementwise import Elementwise, OutputGradient, elementwise


class Network(NamedTuple):
    """Fast weights of all rows, or their gradients."""

    weights: Sequence[Tensor]  # layer l: [R, in_l, out_l]
    biases: Sequence[Tensor]  # layer l: [R, 1, out_l]


class Norm(NamedTuple):
    """The inner LayerNorm, or its gradients."""

    weight: Tensor  # [R, 1, D]
    bias: Tensor  # [R, 1, D]


class Keys(NamedTuple):
    """What the fast weights learn from."""

    k: Tensor  # [R, L, D]
    target: Tensor  # V - K, [R, L, D]
    eta: Tensor  # [R, L, 1]


class Tape(NamedTuple):
    """What backward does not compute again: what each layer makes of keys and queries, before GELU."""

    z: Sequence[Tensor]  # keys, layer l: [R, L, out_l]
    zq: Sequence[Tensor]  # queries, layer l: [R, L, out_l]

    def part(self, tokens: slice) -> "Tape":
        """That of some of the tokens."""
        return Tape(*([z[:, tokens] for z in part] for part in self))


class Steps(NamedTuple):
    """What tokens add to the fast weights: `W_l -= X_l^T s_l`, `b_l -= sum(s_l)`."""

    inputs: Sequence[Tensor]  # X_l: [R, L, in_l]
    steps: Sequence[Tensor]  # s_l: [R, L, out_l]

    def part(self, tokens: slice) -> "Steps":
        """Those of some of the tokens."""
        return Steps(*([x[:, tokens] for x in part] for part in self))


class Scan:
    """The key scan of one inner MLP.

    Args:
        settings: of the inner loop.
        norm: the inner LayerNorm.
    """

    def __init__(self, settings: InnerSettings, norm: Norm) -> None:
        self.size, self.eps, self.clip = settings.mini_batch_size, settings.eps, settings.inner_grad_clip
        self.norm = norm
        self.square = norm.weight * norm.weight
        self.elementwise: Elementwise = elementwise(compiled=settings.backend == "compiled")

    def mini_batches(self, num_tokens: int) -> Iterator[slice]:
        """Of so many tokens; the last one may be shorter."""
        for start in range(0, num_tokens, self.size):
            yield slice(start, min(start + self.size, num_tokens))

    def learn(self, keys: Keys, fast: Network, tape: Tape) -> Steps:
        """The steps of a group that starts at these fast weights; the tape is written."""
        last = len(fast.weights) - 1
        own = _room(keys.k, fast)
        shift = self.shift(keys)
        grams = [gram(keys.k, 1)]
        torch.baddbmm(fast.biases[0], keys.k, fast.weights[0], out=tape.z[0])
        for now in self.mini_batches(keys.k.shape[1]):
            before = slice(now.start)
            part, earlier = own.part(now), own.part(before)
            z = [layer[:, now] for layer in tape.z]
            if now.start:
                z[0].baddbmm_(grams[0][:, now, before], earlier.steps[0], alpha=-1)
            for layer in range(1, last + 1):
                self.elementwise.activate(z[layer - 1], part.inputs[layer])
                torch.baddbmm(fast.biases[layer], part.inputs[layer], fast.weights[layer], out=z[layer])
                if now.start:
                    seen = gram(part.inputs[layer], 1, earlier.inputs[layer])
                    z[layer].baddbmm_(seen, earlier.steps[layer], alpha=-1)
            self.output_gradient(z[last], shift[:, now], keys.eta[:, now], part.steps[last])
            for layer in reversed(range(last)):
                u = part.steps[layer]
                torch.bmm(part.steps[layer + 1], fast.weights[layer + 1].mT, out=u)
                if now.start:
                    seen = part.steps[layer + 1] @ earlier.steps[layer + 1].mT
                    u.baddbmm_(seen, earlier.inputs[layer + 1], alpha=-1)
                self.elementwise.through_gelu(u, z[layer], u)
        return own

    def shift(self, keys: Keys) -> Tensor:
        """`ln_weight * (ln_bias - target)`, `[R, L, D]`."""
        return (self.norm.bias - keys.target).mul_(self.norm.weight)

    def output_gradient(self, z: Tensor, shift: Tensor, eta: Tensor, steps: Tensor) -> OutputGradient:
        """Of the inner loss at the last layer; its steps are written."""
        return self.elementwise.output_gradient(z, shift, self.square, eta, self.eps, self.clip, steps)


def commit(fast: Network, steps: Steps) -> None:
    """Move fast weights on by these tokens, in place."""
    for weight, bias, x, step in zip(*fast, *steps, strict=True):
        weight.baddbmm_(x.mT, step, alpha=-1)
        bias.sub_(step.sum(1, keepdim=True))


def earlier(num_tokens: int, mini_batch_size: int, like: Tensor) -> Tensor:
    """1 where a token (row) is of a later mini-batch than another (column), else 0, `[L, L]`."""
    number = torch.arange(num_tokens, device=like.device) // mini_batch_size
    return (number[:, None] > number[None, :]).to(like)


def gram(x: Tensor, offset: float, other: Tensor | None = None) -> Tensor:
    """`x other^T + offset`, other is x itself where it is not given."""
    return torch.baddbmm(x.new_full((1, 1, 1), offset), x, (x if other is None else other).mT)


def _room(k: Tensor, fast: Network) -> Steps:
    rows, length = k.shape[:2]
    inputs = [k, *(k.new_empty(rows, length, w.shape[1]) for w in fast.weights[1:])]
    return Steps(inputs, [k.new_empty(rows, length, w.shape[2]) for w in fast.weights])
