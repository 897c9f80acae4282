"""A group of mini-batches: what it computes forward, and the buffers that hold it.

Shapes: R = batch rows times heads, G mini-batches of the group, N of the sequence, C mini_batch_size,
D head_dim; inner layer l maps `in_l` to `out_l`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.config import InnerSettings
from moshi_ttt.manual.elementwise import OutputGradient, elementwise


class Network(NamedTuple):
    """Fast weights of all rows, or their gradients."""

    weights: list[Tensor]  # layer l: [R, in_l, out_l]
    biases: list[Tensor]  # layer l: [R, 1, out_l]


class Norm(NamedTuple):
    """The inner LayerNorm, or its gradients."""

    weight: Tensor  # [R, 1, D]
    bias: Tensor  # [R, 1, D]


class Tokens(NamedTuple):
    """The tokens of a group, or their gradients."""

    q: Tensor  # [G, R, C, D]
    k: Tensor  # [G, R, C, D]
    v: Tensor  # [G, R, C, D]
    eta: Tensor  # [G, R, C, 1]


class Tape(NamedTuple):
    """Products with fast weights, of each mini-batch: with them, backward repeats no such product."""

    z_first: Tensor  # keys and queries at the first layer, before GELU, [N, R, 2C, out_0]
    z: list[Tensor]  # keys at the layers after it, [N, R, C, out_l]
    zq: list[Tensor]  # queries there, with the steps of their mini-batch, [N, R, C, out_l]
    u: list[Tensor]  # gradient after GELU of all but the last layer, [N, R, C, out_l]

    @classmethod
    def empty(
        cls, dims: Sequence[int], length: int, num_rows: int, mini_batch_size: int, like: Tensor
    ) -> "Tape":
        """Room for `length` mini-batches of an inner MLP of these widths; dtype and device of `like`."""

        def stack(num_tokens: int, width: int) -> Tensor:
            return like.new_empty(length, num_rows, num_tokens, width)

        c = mini_batch_size
        return cls(
            stack(2 * c, dims[1]),
            [stack(c, o) for o in dims[2:]],
            [stack(c, o) for o in dims[2:]],
            [stack(c, o) for o in dims[1:-1]],
        )

    def part(self, part: slice) -> "Tape":
        """That of some of the mini-batches."""
        return Tape(self.z_first[part], *([x[part] for x in stacks] for stacks in self[1:]))


class Group:
    """Up to G mini-batches: their tokens, and what follows from tokens and tape alone.

    The gradient of the fast weights is a product of stacked rows, so `left` and `right` are laid out for it:
    keys, queries and du beside dZ, dZq and the steps `eta * gradient`. Where no gradients follow, the rows
    for them are left out at the end of `left` and at the start of `right`.

    Args:
        dims: widths of the inner MLP.
        size: G.
        num_rows: R.
        settings: of the inner loop.
        norm: the inner LayerNorm.
        backward: whether gradients follow.
    """

    def __init__(
        self,
        dims: Sequence[int],
        size: int,
        num_rows: int,
        settings: InnerSettings,
        norm: Norm,
        *,
        backward: bool,
    ) -> None:
        c = settings.mini_batch_size

        def stack(*shape: int) -> Tensor:
            return norm.weight.new_empty(size, num_rows, *shape)

        self.settings, self.norm = settings, norm
        self.square = norm.weight * norm.weight
        self.elementwise = elementwise(compiled=settings.backend == "compiled")
        self.count = size
        self.num_layers = len(dims) - 1
        self.left = [stack((3 if backward and layer else 2) * c, i) for layer, i in enumerate(dims[:-1])]
        self.right = [stack((3 if backward else 1) * c, o) for o in dims[1:]]
        self.slopes = [stack(c, o) for o in dims[1:-1]]  # gelu'(Z)
        self.offset = stack(c, dims[-1])  # ln_bias - (v - k)
        self.shift = stack(c, dims[-1])  # ln_weight times that
        self.output_gradients = OutputGradient(
            stack(c, dims[-1]), stack(c, 1), stack(c, 1), stack(c, dims[-1]), stack(c, 1)
        )

    def load(self, tokens: Tokens, tape: Tape) -> None:
        """Take in the tokens of the group, at most G mini-batches, and the tape of as many."""
        self.count = len(tokens.q)
        self.eta, self.tape = tokens.eta, tape
        self.x(0).copy_(tokens.k)
        self.xq(0).copy_(tokens.q)
        torch.sub(tokens.k, tokens.v, out=self.offset[: self.count]).add_(self.norm.bias)
        torch.mul(self.offset[: self.count], self.norm.weight, out=self.shift[: self.count])

    # Views [G, R, C, _] of the mini-batches that are there.
    def x(self, layer: int) -> Tensor:
        """What the keys put into a layer."""
        return self.left[layer][: self.count, :, : self.settings.mini_batch_size]

    def xq(self, layer: int) -> Tensor:
        """What the queries put into a layer."""
        c = self.settings.mini_batch_size
        return self.left[layer][: self.count, :, c : 2 * c]

    def z(self, layer: int) -> Tensor:
        """What a layer makes of the keys, before GELU."""
        if layer:
            return self.tape.z[layer - 1]
        return self.tape.z_first[:, :, : self.settings.mini_batch_size]

    def steps(self, layer: int) -> Tensor:
        """`eta` times the gradient of the inner loss at the output of a layer."""
        return self.right[layer][: self.count, :, -self.settings.mini_batch_size :]

    def slope(self, layer: int) -> Tensor:
        """`gelu'` after a layer."""
        return self.slopes[layer][: self.count]

    def output_gradient(self) -> OutputGradient:
        """Of the inner loss at the last layer."""
        return OutputGradient(*(buffer[: self.count] for buffer in self.output_gradients))

    def answer(self, fast: Network) -> Tensor:
        """Learn from one mini-batch and answer its queries; the tape is written, `fast` moves on in place.

        Returns:
            What the queries read at the last layer, before its LayerNorm, `[1, R, C, D]`.
        """
        tape, last = self.tape, self.num_layers - 1
        torch.baddbmm(fast.biases[0], self.left[0][0], fast.weights[0], out=tape.z_first[0])
        for layer in range(1, self.num_layers):
            self.activate(layer)
            torch.baddbmm(fast.biases[layer], self.x(layer)[0], fast.weights[layer], out=tape.z[layer - 1][0])
        self.step_at_output()
        for layer in reversed(range(last)):
            torch.bmm(self.steps(layer + 1)[0], fast.weights[layer + 1].mT, out=tape.u[layer][0])
            self.step_at_hidden(layer)
        z, _ = self.read_first()
        for layer in range(1, self.num_layers):
            attention = self.attend(layer, z)
            z = torch.baddbmm(
                fast.biases[layer], self.xq(layer)[0], fast.weights[layer], out=tape.zq[layer - 1][0]
            )
            z = z.baddbmm_(attention, self.steps(layer)[0], alpha=-1)[None]
        for layer, (weight, bias) in enumerate(zip(*fast, strict=True)):
            steps = self.steps(layer)[0]
            weight.baddbmm_(self.x(layer)[0].mT, steps, alpha=-1)
            bias.sub_(steps.sum(1, keepdim=True))
        return z

    def recall(self) -> tuple[list[Tensor], list[Tensor]]:
        """All that `answer` has computed, again, from the tape.

        Returns:
            For each layer the attention `[G * R, C, C]`, and what the queries read there `[G, R, C, out_l]`.
        """
        for layer in range(1, self.num_layers):
            self.activate(layer)
        self.step_at_output()
        for layer in reversed(range(self.num_layers - 1)):
            self.step_at_hidden(layer)
        z, attention = self.read_first()
        attentions, outputs = [attention], [z, *self.tape.zq]
        for layer in range(1, self.num_layers):
            attentions.append(self.attend(layer, outputs[layer - 1]))
        return attentions, outputs

    def activate(self, layer: int) -> None:
        """What the keys put into a layer, from what the one before it made of them."""
        self.elementwise.activate(self.z(layer - 1), self.x(layer), self.slope(layer - 1))

    def step_at_output(self) -> None:
        """Steps of the last layer."""
        last, settings = self.num_layers - 1, self.settings
        self.elementwise.output_gradient(
            self.z(last),
            self.shift[: self.count],
            self.square,
            self.eta,
            settings.eps,
            settings.inner_grad_clip,
            self.output_gradient(),
            self.steps(last),
        )

    def step_at_hidden(self, layer: int) -> None:
        """Steps of another layer, from the tape."""
        torch.mul(self.tape.u[layer], self.slope(layer), out=self.steps(layer))

    def read_first(self) -> tuple[Tensor, Tensor]:
        """What the queries read at the first layer `[G, R, C, out_0]`, and the attention."""
        attention = self._attention(0)
        z = flat(self.tape.z_first[:, :, self.settings.mini_batch_size :])
        z = torch.baddbmm(z, attention, flat(self.steps(0)), alpha=-1)
        return z.unflatten(0, (self.count, -1)), attention

    def attend(self, layer: int, z: Tensor) -> Tensor:
        """Attention of a layer `[G * R, C, C]`, from what the queries read at the one before."""
        torch.ops.aten.gelu.out(z, approximate="tanh", out=self.xq(layer))
        return self._attention(layer)

    def _attention(self, layer: int) -> Tensor:
        """`Xq X^T + 1`, as far as a query may see."""
        x, xq = flat(self.x(layer)), flat(self.xq(layer))
        attention = torch.baddbmm(x.new_ones(1, 1, 1), xq, x.mT)
        return attention.tril_() if self.settings.causal else attention


def flat(x: Tensor) -> Tensor:
    """`[G, R, ...]` to `[G * R, ...]`, a view."""
    return x.flatten(0, 1)
