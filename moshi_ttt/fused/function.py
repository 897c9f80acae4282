"""The inner loop as an autograd function over a sequence: Triton for the key scan, PyTorch for the reading.

Shapes: B batch rows, H heads, R = B * H, T tokens, P of them with padding, C mini_batch_size, D head_dim,
F hidden width, L tokens of a group, NG groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.config import InnerSettings
from moshi_ttt.fused.launch import GROUP_LENGTH, launch
from moshi_ttt.manual.function import Learned
from moshi_ttt.manual.read import Reading, visible
from moshi_ttt.manual.scan import Keys, Network, Norm, Scan, Steps


def run_fused(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    settings: InnerSettings,
) -> tuple[Tensor, Learned]:
    """As `moshi_ttt.manual.run_manual`, for what `moshi_ttt.fused.support` lets through."""
    tensors = (*tokens, ln_weight, ln_bias, *weights, *biases)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out, w0, w1, b0, b1, x1, s0, s1 = _FusedInnerLoop.apply(settings, keep, *tensors)
    return out, Learned((w0, w1), (b0, b1), (x1,), (s0, s1))


class _FusedInnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: InnerSettings, keep: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        from moshi_ttt.fused.kernels import scan_forward  # needs Triton

        sequence = _Sequence(tensors, settings)
        k, fast = sequence.k, sequence.fast
        z0, u, z1 = (
            k.new_empty(*k.shape[:2], width) for width in (sequence.hidden, sequence.hidden, k.shape[2])
        )
        groups = [w.new_empty(w.shape[0], sequence.num_groups, *w.shape[1:]) for w in fast]
        last = [torch.empty_like(w) for w in fast]
        launch(
            scan_forward,
            *sequence.learned_from(),
            *fast,
            z0,
            u,
            z1,
            *groups,
            *last,
            sizes=sequence.sizes(),
            eps=settings.eps,
            shape=sequence.shape(),
        )
        own = sequence.steps(z0, u, z1)
        zq = [torch.empty_like(z) for z in sequence.by_group(z0, z1)]
        out = torch.empty_like(k)
        reading = sequence.reading(own, groups, zq)
        reading.answer(sequence.group_norm(), settings.eps, sequence.by_group(out)[0])
        if keep:
            ctx.set_materialize_grads(False)
            ctx.settings = settings
            ctx.save_for_backward(*tensors, z0, u, z1, *zq, *groups, *last)
        tail = own.part(slice(sequence.num_committed, sequence.num_tokens))
        pending = [x.contiguous() for x in (tail.inputs[1], *tail.steps)]
        w0, b0, w1, b1 = last
        learned = (w0, w1, b0[:, None], b1[:, None], *pending)
        return sequence.unflat(out[:, : sequence.num_tokens]), *(sequence.unflat(x) for x in learned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlearned: Tensor | None) -> tuple[Tensor | None, ...]:
        from moshi_ttt.fused.kernels import scan_backward  # needs Triton

        saved = list(ctx.saved_tensors)  # once only: gradient checkpointing makes them again here
        tensors, saved = saved[:10], saved[10:]
        z0, u, z1, *saved = saved
        zq, groups, last = saved[:2], saved[2:6], saved[6:]
        sequence, settings = _Sequence(tensors, ctx.settings), ctx.settings
        k, functions = sequence.k, sequence.scan.elementwise
        own = sequence.steps(z0, u, z1)

        gradients = Steps(*([torch.zeros_like(x) for x in part] for part in own))
        dgroups = [torch.zeros_like(w) for w in groups]
        dnorm = Norm(*(torch.zeros_like(x) for x in sequence.group_norm()))
        dq = torch.zeros_like(k)
        if dout is not None:
            dq = sequence.reading(own, groups, zq).back(
                sequence.by_group(sequence.padded(dout))[0],
                sequence.group_norm(),
                settings.eps,
                Steps(*(sequence.by_group(*part) for part in gradients)),
                sequence.network(dgroups),
                dnorm,
            )
            dq = dq.view(k.shape)
        *dlast, dx1, ds0, ds1 = dlearned
        tail = slice(sequence.num_committed, sequence.num_tokens)
        for total, gradient in zip((gradients.inputs[1], *gradients.steps), (dx1, ds0, ds1), strict=True):
            if gradient is not None:
                total[:, tail].add_(gradient.flatten(0, 1))
        dfast = [
            torch.zeros_like(w) if gradient is None else gradient.reshape(w.shape).clone()
            for w, gradient in zip(last, (dlast[0], dlast[2], dlast[1], dlast[3]), strict=True)
        ]
        dw0_after = torch.empty_like(groups[0])
        dw0_after[:, -1] = dfast[0]
        dz0, dtarget, deta = torch.empty_like(z0), torch.empty_like(k), torch.empty_like(sequence.eta)
        dln = [torch.empty_like(k[:, 0]) for _ in range(2)]
        launch(
            scan_backward,
            *sequence.learned_from(),
            own.inputs[1],
            functions.gelu_slope(z0),
            functions.u_phi2(z0, u),
            z1,
            groups[2],
            last[2].clone(),
            gradients.steps[0],
            gradients.inputs[1],
            gradients.steps[1],
            *dgroups,
            *dfast,
            dw0_after,
            dz0,
            dtarget,
            deta,
            *dln,
            sizes=sequence.sizes(),
            eps=settings.eps,
            shape=sequence.shape(),
        )
        own.steps[0][:, sequence.num_committed :] = 0
        dk = sequence.key_gradients(gradients.inputs[0], own, dz0, groups[0], dw0_after).sub_(dtarget)
        dtokens = [sequence.unflat(x[:, : sequence.num_tokens]) for x in (dq, dk, dtarget, deta)]
        dnorms = [
            sequence.unflat(own + read.view(k.shape[0], -1, k.shape[2]).sum(1)).sum(0)[:, None]
            for own, read in zip(dln, dnorm, strict=True)
        ]
        w0, b0, w1, b1 = dfast
        return (
            None,
            None,
            *dtokens,
            *dnorms,
            *(sequence.unflat(x) for x in (w0, w1, b0[:, None], b1[:, None])),
        )


class _Sequence:
    """What autograd sees, in the layout of the kernels: rows of batch and head, padded to full groups."""

    def __init__(self, tensors: Sequence[Tensor], settings: InnerSettings) -> None:
        self.rows = tensors[0].shape[:2]  # B, H
        self.num_tokens, size = tensors[0].shape[2], settings.mini_batch_size
        self.num_committed = self.num_tokens - self.num_tokens % size
        self.length = max(GROUP_LENGTH, size)
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
        number = torch.arange(self.length, device=k.device) // self.settings.mini_batch_size
        earlier = (number[:, None] > number[None, :]).to(k)
        cross = torch.bmm(dz0_groups, s0.mT).mul_(earlier)
        (dk,) = self.by_group(read)
        dk.baddbmm_(dz0_groups, w0_groups.flatten(0, 1).mT)
        dk.baddbmm_(s0, dw0_after.flatten(0, 1).mT, alpha=-1)
        dk.baddbmm_(cross + cross.mT, k, alpha=-1)
        return read
