"""The inner loop as an autograd function over a sequence: Triton for the key scan, PyTorch for the reading.

Shapes: B batch rows, H heads, R = B * H, T tokens, P of them with padding, C mini_batch_size, D head_dim,
F hidden width, L tokens of a group, NG groups.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.config import InnerSettings
from moshi_ttt.fused.launch import launch
from moshi_ttt.fused.sequence import PaddedSequence
from moshi_ttt.manual.function import Learned, add_pending, needs_tape
from moshi_ttt.manual.scan import Norm, Steps

_NUM_TENSORS = 10  # 4 of the tokens, 2 of the norm, 4 of the fast weights


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
    found = _FusedInnerLoop.apply(settings, needs_tape(tensors), *tensors)
    out, w0, w1, b0, b1, x1, s0, s1 = found
    return out, Learned((w0, w1), (b0, b1), (x1,), (s0, s1))


class _FusedInnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: InnerSettings, keep: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        from moshi_ttt.fused.kernels import scan_forward  # needs Triton

        sequence = PaddedSequence(tensors, settings)
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
        saved = list(ctx.saved_tensors)  # once only: gradient checkpointing makes them again here
        sequence, tape = PaddedSequence(saved[:_NUM_TENSORS], ctx.settings), _Tape(*saved[_NUM_TENSORS:])
        own = sequence.steps(tape.z0, tape.u, tape.z1)
        gradients = Steps(*([torch.zeros_like(x) for x in part] for part in own))
        dgroups = [torch.zeros_like(w) for w in tape.groups]
        dlast, dpending = dlearned[:4], dlearned[4:]
        tail = slice(sequence.num_committed, sequence.num_tokens)
        add_pending(gradients.part(tail), dpending)
        dfast = [
            torch.zeros_like(w) if gradient is None else gradient.reshape(w.shape).clone()
            for w, gradient in zip(tape.last, (dlast[0], dlast[2], dlast[1], dlast[3]), strict=True)
        ]
        dq, dnorm_read = _back_through_reading(sequence, tape, own, dout, gradients, dgroups)
        dtokens, dnorm_scan = _back_through_scan(sequence, tape, own, gradients, dgroups, dfast)
        tokens = [sequence.unflat(x[:, : sequence.num_tokens]) for x in (dq, *dtokens)]
        norms = [
            sequence.unflat(scan + read).sum(0)[:, None]
            for scan, read in zip(dnorm_scan, dnorm_read, strict=True)
        ]
        w0, b0, w1, b1 = dfast
        fast = (sequence.unflat(x) for x in (w0, w1, b0[:, None], b1[:, None]))
        return None, None, *tokens, *norms, *fast


class _Tape(NamedTuple):
    """What forward keeps beside its arguments; fast weights as w0, b0, w1, b1."""

    z0: Tensor  # [R, P, F]
    u: Tensor  # [R, P, F]
    z1: Tensor  # [R, P, D]
    zq0: Tensor  # [R * NG, L, F]
    zq1: Tensor  # [R * NG, L, D]
    w0_groups: Tensor  # at the start of each group, [R, NG, ...]
    b0_groups: Tensor
    w1_groups: Tensor
    b1_groups: Tensor
    w0_last: Tensor  # after the last full mini-batch, [R, ...]
    b0_last: Tensor
    w1_last: Tensor
    b1_last: Tensor

    @property
    def groups(self) -> list[Tensor]:
        """At the start of each group."""
        return [self.w0_groups, self.b0_groups, self.w1_groups, self.b1_groups]

    @property
    def last(self) -> list[Tensor]:
        """After the last full mini-batch."""
        return [self.w0_last, self.b0_last, self.w1_last, self.b1_last]


def _back_through_reading(
    sequence: PaddedSequence,
    tape: _Tape,
    own: Steps,
    dout: Tensor | None,
    gradients: Steps,
    dgroups: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of q `[R, P, D]` and of weight and bias of the norm `[R, D]`; the others are added to."""
    norm, k = sequence.group_norm(), sequence.k
    dnorm = Norm(*(torch.zeros_like(x) for x in norm))
    if dout is None:
        return torch.zeros_like(k), [torch.zeros_like(k[:, 0]) for _ in dnorm]
    dq = sequence.reading(own, tape.groups, [tape.zq0, tape.zq1]).back(
        sequence.by_group(sequence.padded(dout))[0],
        norm,
        sequence.settings.eps,
        Steps(*(sequence.by_group(*part) for part in gradients)),
        sequence.network(dgroups),
        dnorm,
    )
    return dq.view(k.shape), [x.view(k.shape[0], -1, k.shape[2]).sum(1) for x in dnorm]


def _back_through_scan(
    sequence: PaddedSequence,
    tape: _Tape,
    own: Steps,
    gradients: Steps,
    dgroups: Sequence[Tensor],
    dfast: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of k, v `[R, P, D]`, eta `[R, P]` and of the norm `[R, D]`; dfast goes back to the start."""
    from moshi_ttt.fused.kernels import scan_backward  # needs Triton

    k, functions = sequence.k, sequence.scan.elementwise
    dw0_after = torch.empty_like(tape.w0_groups)
    dw0_after[:, -1] = dfast[0]
    dz0, dtarget, deta = torch.empty_like(tape.z0), torch.empty_like(k), torch.empty_like(sequence.eta)
    dnorm = [torch.empty_like(k[:, 0]) for _ in range(2)]
    launch(
        scan_backward,
        *sequence.learned_from(),
        own.inputs[1],
        functions.gelu_slope(tape.z0),
        functions.u_phi2(tape.z0, tape.u),
        tape.z1,
        tape.w1_groups,
        tape.w1_last.clone(),
        gradients.steps[0],
        gradients.inputs[1],
        gradients.steps[1],
        *dgroups,
        *dfast,
        dw0_after,
        dz0,
        dtarget,
        deta,
        *dnorm,
        sizes=sequence.sizes(),
        eps=sequence.settings.eps,
        shape=sequence.shape(),
    )
    own.steps[0][:, sequence.num_committed :] = 0  # those were never taken
    dk = sequence.key_gradients(gradients.inputs[0], own, dz0, tape.w0_groups, dw0_after).sub_(dtarget)
    return [dk, dtarget, deta], dnorm
