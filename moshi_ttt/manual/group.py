"""A group of mini-batches: what it computes forward, and the buffers that hold it.

Shapes: R = batch rows times heads, G mini-batches of the group, C mini_batch_size, D head_dim; inner layer l
maps `in_l` to `out_l`.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.manual.elementwise import OutputGradient, elementwise


class Settings(NamedTuple):
    """Of the inner loop, see `moshi_ttt.ops.ttt_mlp_with_states`."""

    mini_batch_size: int
    causal: bool
    eps: float
    inner_grad_clip: float | None
    state_decay: float | None
    compiled: bool  # what is done to each token on its own goes through torch.compile
    stacked: bool  # forward keeps the fast weights of a whole group, whose queries are then one product


class Network(NamedTuple):
    """Fast weights of all rows, or their gradients."""

    weights: tuple[Tensor, ...]  # layer l: [R, in_l, out_l]
    biases: tuple[Tensor, ...]  # layer l: [R, 1, out_l]


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


class Reading(NamedTuple):
    """What the queries of a group read."""

    attentions: list[Tensor]  # layer l: Xq X^T + 1 as far as a query may see, [G * R, C, C]
    outputs: list[Tensor]  # layer l, before GELU: [G * R, C, out_l]


class Group:
    """The forward pass of up to G mini-batches, from the fast weights in `weights[l][0]` and `biases[l][0]`.

    The gradient of the fast weights is a product of stacked rows, so `left` and `right` are laid out for it:
    keys, queries and du beside dZ, dZq and the steps `eta * gradient`. Where no gradients follow, the rows
    for them are left out at the end of `left` and at the start of `right`.

    Args:
        dims: widths of the inner MLP.
        size: G.
        num_rows: R.
        settings: of the inner loop.
        like: dtype and device.
        backward: whether gradients follow.
        in_place: keep the fast weights of one mini-batch only; G must be 1.
    """

    def __init__(
        self,
        dims: Sequence[int],
        size: int,
        num_rows: int,
        settings: Settings,
        like: Tensor,
        *,
        backward: bool,
        in_place: bool = False,
    ) -> None:
        assert size == 1 or not in_place
        c = settings.mini_batch_size

        def stack(*shape: int, count: int = size) -> Tensor:
            return like.new_empty(count, num_rows, *shape)

        self.settings = settings
        self.elementwise = elementwise(compiled=settings.compiled)
        self.count = size
        self.num_layers = len(dims) - 1
        self.in_place = in_place
        num_states = 1 if in_place else size + 1
        self.weights = [stack(i, o, count=num_states) for i, o in pairwise(dims)]
        self.biases = [stack(1, o, count=num_states) for o in dims[1:]]
        self.left = [stack((3 if backward and layer else 2) * c, i) for layer, i in enumerate(dims[:-1])]
        self.right = [stack((3 if backward else 1) * c, o) for o in dims[1:]]
        self.z_first = stack(2 * c, dims[1])  # of keys and queries, one product
        self.z_next = [stack(c, o) for o in dims[2:]]  # of keys
        self.slope = [stack(c, o) for o in dims[1:-1]]  # gelu'(Z)
        self.u = [stack(c, o) for o in dims[1:-1]]  # gradient before it is multiplied by the slope
        self.offset = stack(c, dims[-1])  # ln_bias - (v - k)
        self.shift = stack(c, dims[-1])  # ln_weight times that
        self.output_gradient = OutputGradient(
            stack(c, dims[-1]), stack(c, 1), stack(c, 1), stack(c, dims[-1]), stack(c, 1)
        )

    # Rows of `left` and `right`, [G, R, C, _].
    def x(self, layer: int) -> Tensor:
        """What the keys put into a layer."""
        return self.left[layer][: self.count, :, : self.settings.mini_batch_size]

    def xq(self, layer: int) -> Tensor:
        """What the queries put into a layer."""
        c = self.settings.mini_batch_size
        return self.left[layer][: self.count, :, c : 2 * c]

    def steps(self, layer: int) -> Tensor:
        """`eta` times the gradient of the inner loss at the output of a layer."""
        return self.right[layer][: self.count, :, -self.settings.mini_batch_size :]

    def z(self, layer: int) -> Tensor:
        """Output of a layer for the keys, before GELU."""
        if layer:
            return self.z_next[layer - 1][: self.count]
        return self.z_first[: self.count, :, : self.settings.mini_batch_size]

    def load(self, tokens: Tokens, norm: Norm, initial: Network | None) -> None:
        """Take in the tokens of the group.

        Args:
            tokens: at most G mini-batches.
            norm: the inner LayerNorm.
            initial: `W0`, when the state decays.
        """
        self.count = len(tokens.q)
        self.eta = tokens.eta
        self.initial = initial
        self.x(0).copy_(tokens.k)
        self.xq(0).copy_(tokens.q)
        offset, shift = self.offset[: self.count], self.shift[: self.count]
        torch.sub(tokens.k, tokens.v, out=offset).add_(norm.bias)
        torch.mul(offset, norm.weight, out=shift)
        self.square = norm.weight * norm.weight

    def learn(self) -> None:
        """Take the steps of all mini-batches, one after the other."""
        for n in range(self.count):
            self.compute_steps(n)
            self.commit(n)

    def compute_steps(self, n: int) -> None:
        """The steps of a mini-batch, at the fast weights before it."""
        c, last = self.settings.mini_batch_size, self.num_layers - 1
        weights, biases = [w[n] for w in self.weights], [b[n] for b in self.biases]
        inputs, steps = [x[n, :, :c] for x in self.left], [step[n, :, -c:] for step in self.right]
        z = torch.baddbmm(biases[0], self.left[0][n, :, : 2 * c], weights[0], out=self.z_first[n])[:, :c]
        for layer in range(1, self.num_layers):
            self.elementwise.activate(z, inputs[layer], self.slope[layer - 1][n])
            z = torch.baddbmm(biases[layer], inputs[layer], weights[layer], out=self.z_next[layer - 1][n])
        self.elementwise.output_gradient(
            z,
            self.shift[n],
            self.square,
            self.eta[n],
            self.settings.eps,
            self.settings.inner_grad_clip,
            OutputGradient(*(buffer[n] for buffer in self.output_gradient)),
            steps[last],
        )
        for layer in reversed(range(last)):
            u = torch.bmm(steps[layer + 1], weights[layer + 1].mT, out=self.u[layer][n])
            torch.mul(u, self.slope[layer][n], out=steps[layer])

    def commit(self, n: int) -> None:
        """Apply the steps of a mini-batch, to the fast weights of the next one or in place."""
        c, decay = self.settings.mini_batch_size, self.settings.state_decay
        target = 0 if self.in_place else n + 1
        for layer, (weights, biases) in enumerate(zip(self.weights, self.biases, strict=True)):
            x, steps = self.left[layer][n, :, :c], self.right[layer][n, :, -c:]
            torch.baddbmm(weights[n], x.mT, steps, alpha=-1, out=weights[target])
            torch.sub(biases[n], steps.sum(1, keepdim=True), out=biases[target])
            if decay is not None:
                assert self.initial is not None
                weights[target].lerp_(self.initial.weights[layer], decay)
                biases[target].lerp_(self.initial.biases[layer], decay)

    def answer(self) -> Tensor:
        """Learn from all mini-batches and answer their queries; the next group starts after them.

        Returns:
            What the queries read at the last layer, before its LayerNorm, `[G, R, C, D]`.
        """
        if self.in_place:
            self.compute_steps(0)
            reading = self.read(num_layers=self.num_layers)
            self.commit(0)
        else:
            self.learn()
            reading = self.read(num_layers=self.num_layers)
            for stack in (*self.weights, *self.biases):
                stack[0].copy_(stack[self.count])
        return reading.outputs[-1].unflatten(0, (self.count, -1))

    def read(self, *, num_layers: int) -> Reading:
        """What the queries read with the steps of their own mini-batch.

        Args:
            num_layers: how many layers are read; with all of them, the last of `outputs` is the answer before
                its LayerNorm.
        """
        attentions, outputs = [], []
        for layer in range(self.num_layers):
            x, xq, steps = (flat(part(layer)) for part in (self.x, self.xq, self.steps))
            if layer:
                z = outputs[-1].view_as(self.xq(layer))
                torch.ops.aten.gelu.out(z, approximate="tanh", out=self.xq(layer))
            attention = torch.baddbmm(x.new_ones(1, 1, 1), xq, x.mT)
            attentions.append(attention.tril_() if self.settings.causal else attention)
            if layer == num_layers:
                break
            if layer:
                weights, biases = (flat(part[layer][: self.count]) for part in (self.weights, self.biases))
                z = torch.baddbmm(biases, xq, weights).baddbmm_(attention, steps, alpha=-1)
            else:
                z = flat(self.z_first[: self.count, :, self.settings.mini_batch_size :])
                z = torch.baddbmm(z, attention, steps, alpha=-1)
            outputs.append(z)
        return Reading(attentions, outputs)


def flat(x: Tensor) -> Tensor:
    """`[G, R, ...]` to `[G * R, ...]`, a view."""
    return x.flatten(0, 1)
