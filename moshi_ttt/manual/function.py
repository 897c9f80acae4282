"""The manual inner loop as an autograd function over a sequence of full mini-batches.

Forward keeps the tokens, the fast weights at the start of every group of mini-batches, and what the queries
read at the last layer; backward runs each group again.

Shapes: B batch rows, H heads, R = B * H, T tokens, C mini_batch_size, D head_dim.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.manual.backward import GroupBackward
from moshi_ttt.manual.elementwise import normalise
from moshi_ttt.manual.group import Group, Network, Norm, Settings, Tokens


def run_manual(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    initial_weights: Sequence[Tensor],
    initial_biases: Sequence[Tensor],
    settings: Settings,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Learn from and answer full mini-batches; first derivatives only.

    Args:
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`, T a multiple of C; all tensors of one dtype.
        weights, biases: fast weights before them, layer l: `[B, H, in, out]` and `[B, H, 1, out]`.
        ln_weight, ln_bias: inner LayerNorm, `[H, 1, D]`.
        initial_weights, initial_biases: `W0` `[H, in, out]` and `[H, 1, out]`, for the decay of the state.
        settings: of the inner loop.

    Returns:
        Outputs `[B, H, T, D]`, and the fast weights and biases after the last token.
    """
    initial = (*initial_weights, *initial_biases) if settings.state_decay is not None else ()
    tensors = (*tokens, ln_weight, ln_bias, *weights, *biases, *initial)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out, *last = _ManualInnerLoop.apply(settings, len(weights), keep, *tensors)
    return out, tuple(last[: len(weights)]), tuple(last[len(weights) :])


class _ManualInnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, num_layers: int, keep: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        arguments = _Arguments.of(tensors, num_layers)
        q = arguments.tokens[0]
        rows, norm, initial = q.shape[:2], arguments.norm_rows(), arguments.initial_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        num_batches = len(tokens.q)
        size = _group_size(num_batches)
        # On a CPU fast weights that are updated in place stay in its cache; on a GPU, what the queries of a
        # whole group read is one product.
        in_place = q.device.type == "cpu"
        group = Group(
            arguments.dims, 1 if in_place else size, rows.numel(), settings, q, backward=False, in_place=in_place
        )
        _copy_network(arguments.fast, group, 0)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out_batches = _mini_batches(out, settings.mini_batch_size)
        z_out = q.new_empty(tokens.q.shape) if keep else None
        carries = []
        for part in _parts(num_batches, 1 if in_place else size):
            if keep and part.start > 0 and part.start % size == 0:
                carries += [w[0].clone() for w in (*group.weights, *group.biases)]
            tokens_part = Tokens(*(x[part] for x in tokens))
            group.load(tokens_part, norm, initial)
            z = group.answer().view(tokens_part.q.shape)
            if z_out is not None:
                z_out[part] = z
            normed, _, _ = normalise(z, settings.eps)
            torch.add(normed.mul_(norm.weight).add_(norm.bias), tokens_part.q, out=out_batches[part])
        last = [w[0].view(*rows, *w.shape[2:]) for w in (*group.weights, *group.biases)]
        if keep:
            ctx.set_materialize_grads(False)
            ctx.settings, ctx.num_layers, ctx.size = settings, num_layers, size
            ctx.num_tensors = len(tensors)
            ctx.save_for_backward(*tensors, z_out, *carries)
        return out, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, num_layers = ctx.settings, ctx.num_layers
        tensors, (z_out, *carries) = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        arguments = _Arguments.of(tensors, num_layers)
        q = arguments.tokens[0]
        rows, norm, initial = q.shape[:2], arguments.norm_rows(), arguments.initial_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        dout = torch.zeros_like(q) if dout is None else dout
        dout_batches = _mini_batches(dout, settings.mini_batch_size)
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments.tokens]
        gradient_batches = _in_mini_batches(gradients, settings.mini_batch_size)
        after = _gradient_network(arguments.fast, dlast, num_layers)
        dinitial = None if initial is None else Network(*(tuple(map(torch.zeros_like, p)) for p in initial))
        dnorm = Norm(torch.zeros_like(norm.weight), torch.zeros_like(norm.bias))
        group = Group(arguments.dims, ctx.size, rows.numel(), settings, q, backward=True)
        parts = list(_parts(len(tokens.q), ctx.size))
        for index, part in reversed(list(enumerate(parts))):
            start = arguments.fast if index == 0 else carries[(index - 1) * 2 * num_layers :][: 2 * num_layers]
            _copy_network(start, group, 0)
            tokens_part = Tokens(*(x[part] for x in tokens))
            group.load(tokens_part, norm, initial)
            group.learn()
            result = GroupBackward(group, tokens_part, norm).run(
                dout_batches[part].contiguous(), z_out[part], after, dinitial
            )
            for batches, gradient in zip(gradient_batches, result.tokens, strict=True):
                batches[part] = gradient
            for total, gradient in zip(dnorm, result.norm, strict=True):
                total.add_(gradient)
        dnorms = [x.view(*rows, 1, -1).sum(0) for x in dnorm]
        dfast = [x.view(*rows, *x.shape[1:]) for x in (*after.weights, *after.biases)]
        dinitials = [] if dinitial is None else [
            x.view(*rows, *x.shape[1:]).sum(0) for x in (*dinitial.weights, *dinitial.biases)
        ]
        return None, None, None, *gradients, *dnorms, *dfast, *dinitials


class _Arguments(NamedTuple):
    """The tensors that autograd sees, sorted."""

    tokens: tuple[Tensor, ...]  # q, k, v [B, H, T, D], eta [B, H, T]
    norm: tuple[Tensor, ...]  # [H, 1, D]
    fast: tuple[Tensor, ...]  # weights, then biases
    initial: tuple[Tensor, ...]  # the same of W0, or nothing

    @classmethod
    def of(cls, tensors: Sequence[Tensor], num_layers: int) -> "_Arguments":
        stop = 6 + 2 * num_layers
        return cls(tuple(tensors[:4]), tuple(tensors[4:6]), tuple(tensors[6:stop]), tuple(tensors[stop:]))

    @property
    def dims(self) -> list[int]:
        weights = self.fast[: len(self.fast) // 2]
        return [weights[0].shape[-2], *(w.shape[-1] for w in weights)]

    def norm_rows(self) -> Norm:
        batch_size = self.tokens[0].shape[0]
        return Norm(*(x.repeat(batch_size, 1, 1) for x in self.norm))

    def initial_rows(self) -> Network | None:
        if not self.initial:
            return None
        rows = [w.repeat(self.tokens[0].shape[0], 1, 1) for w in self.initial]
        return Network(tuple(rows[: len(rows) // 2]), tuple(rows[len(rows) // 2 :]))


def _group_size(num_batches: int) -> int:
    """As many states inside a group as there are groups, the least memory."""
    return math.ceil(math.sqrt(num_batches))


def _parts(num_batches: int, size: int) -> Iterator[slice]:
    for start in range(0, num_batches, size):
        yield slice(start, min(start + size, num_batches))


def _mini_batches(x: Tensor, size: int) -> Tensor:
    """`[B, H, T, D]` to `[T / C, R, C, D]`, a view of a contiguous x."""
    return x.flatten(0, 1).unflatten(1, (-1, size)).transpose(0, 1)


def _in_mini_batches(tokens: Sequence[Tensor], size: int) -> Tokens:
    q, k, v, eta = tokens
    return Tokens(*(_mini_batches(x, size) for x in (q, k, v, eta[..., None])))


def _copy_network(tensors: Sequence[Tensor], group: Group, n: int) -> None:
    for stack, tensor in zip((*group.weights, *group.biases), tensors, strict=True):
        stack[n].view(tensor.shape).copy_(tensor)


def _gradient_network(
    fast: Sequence[Tensor], gradients: Sequence[Tensor | None], num_layers: int
) -> Network:
    """Gradients of the last fast weights as `[R, ...]` that may be written to."""
    own = [
        torch.zeros_like(w, memory_format=torch.contiguous_format)
        if g is None
        else g.clone(memory_format=torch.contiguous_format)
        for w, g in zip(fast, gradients, strict=True)
    ]
    rows = [x.flatten(0, 1) for x in own]
    return Network(tuple(rows[:num_layers]), tuple(rows[num_layers:]))
