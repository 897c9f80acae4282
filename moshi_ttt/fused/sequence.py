"""A sequence in the layout of the kernels: rows of batch and head, padded to full groups.

Shapes: B batch rows, H heads, R = B * H, T tokens, P of them with padding, D head_dim, L tokens of a group,
NG groups.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_ttt.config import InnerSettings
from moshi_ttt.fused.launch import group_length
from moshi_ttt.manual.backward import through_first_layer
from moshi_ttt.manual.read import Reading, visible
from moshi_ttt.manual.scan import Keys, Network, Norm, Scan, Steps, earlier


class PaddedSequence:
    """What autograd sees.

    Args:
        tensors: q, k, v `[B, H, T, D]`, eta `[B, H, T]`, weight and bias of the inner LayerNorm `[H, 1, D]`,
            fast weights and biases of both layers.
        settings: of the inner loop.
    """

    def __init__(self, tensors: Sequence[Tensor], settings: InnerSettings) -> None:
        self.rows = tensors[0].shape[:2]  # B, H
        self.num_tokens, size = tensors[0].shape[2], settings.mini_batch_size
        self.num_committed = self.num_tokens - self.num_tokens % size
        self.length = group_length(size)
        self.num_groups = -(-self.num_tokens // self.length)
        self.q, self.k, self.v = (self.padded(x) for x in tensors[:3])  # [R, P, D]
        self.eta = self.padded(tensors[3][..., None])[..., 0]  # [R, P]
        self.ln = [x[:, 0].contiguous() for x in tensors[4:6]]  # [H, D]
        self.norm = Norm(*(x.repeat(self.rows[0], 1, 1) for x in tensors[4:6]))  # [R, 1, D]
        w0, w1, b0, b1 = (x.flatten(0, 1) for x in tensors[6:])
        self.fast = [x.contiguous() for x in (w0, b0[:, 0], w1, b1[:, 0])]
        self.hidden = w0.shape[-1]
        self.settings, self.scan = settings, Scan(settings, self.norm)

    def padded(self, x: Tensor) -> Tensor:
        """`[B, H, T, _]` to `[R, P, _]`, contiguous."""
        missing = self.num_groups * self.length - x.shape[2]
        return F.pad(x.flatten(0, 1), (0, 0, 0, missing)).contiguous()

    def unflat(self, x: Tensor) -> Tensor:
        """`[R, ...]` to `[B, H, ...]`."""
        return x.unflatten(0, self.rows)

    def by_group(self, *tensors: Tensor) -> list[Tensor]:
        """`[R, P, _]` to `[R * NG, L, _]`, views."""
        return [x.view(-1, self.length, x.shape[-1]) for x in tensors]

    def learned_from(self) -> tuple[Tensor, ...]:
        """What both kernels begin with."""
        return self.k, self.v, self.eta, *self.ln

    def sizes(self) -> tuple[int, ...]:
        """Tokens, mini-batches with padding, heads, groups."""
        num_batches = self.num_groups * self.length // self.settings.mini_batch_size
        return self.num_tokens, num_batches, self.rows[1], self.num_groups

    def shape(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        size = self.settings.mini_batch_size
        return {"D": self.k.shape[2], "F": self.hidden, "C": size, "G": self.length // size}

    def steps(self, z0: Tensor, u: Tensor, z1: Tensor) -> Steps:
        """What the tokens add, `[R, P, _]`."""
        x1, s0, s1 = (torch.empty_like(z) for z in (z0, u, z1))
        functions, keys = self.scan.elementwise, Keys(self.k, self.v - self.k, self.eta[..., None])
        functions.activate(z0, x1)
        functions.through_gelu(u, z0, s0)
        self.scan.output_gradient(z1, self.scan.shift(keys), keys.eta, s1)
        return Steps([self.k, x1], [s0, s1])

    def network(self, groups: Sequence[Tensor]) -> Network:
        """Fast weights at the start of each group, `[R * NG, ...]`, views."""
        w0, b0, w1, b1 = (x.flatten(0, 1) for x in groups)
        return Network([w0, w1], [b0[:, None], b1[:, None]])

    def group_norm(self) -> Norm:
        """`[R * NG, 1, D]`."""
        return Norm(*(x.repeat_interleave(self.num_groups, 0) for x in self.norm))

    def reading(self, own: Steps, groups: Sequence[Tensor], zq: Sequence[Tensor]) -> Reading:
        """All queries."""
        size, causal = self.settings.mini_batch_size, self.settings.causal
        sees = visible(self.length, size, causal=causal, like=self.q)
        by_group = Steps(*(self.by_group(*part) for part in own))
        (q,) = self.by_group(self.q)
        return Reading(q, by_group, self.network(groups), sees, zq, self.scan.elementwise)

    def key_gradients(
        self, read: Tensor, own: Steps, dz0: Tensor, w0_groups: Tensor, dw0_after: Tensor
    ) -> Tensor:
        """The gradient of k but for the target's, `[R, P, D]`.

        W_0 at a mini-batch is that of its group's start less the steps before it, and its gradient there that
        after the group with those of the mini-batches behind it.
        """
        k, s0, dz0_groups = self.by_group(self.k, own.steps[0], dz0)
        (dk,) = self.by_group(read)
        dk.baddbmm_(s0, dw0_after.flatten(0, 1).mT, alpha=-1)
        before = earlier(self.length, self.settings.mini_batch_size, k)
        through_first_layer(dk, k, s0, dz0_groups, w0_groups.flatten(0, 1), before)
        return read
