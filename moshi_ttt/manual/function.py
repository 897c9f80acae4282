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
        norm, initial = arguments.norm_rows(), arguments.initial_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        size = _group_size(len(tokens.q))
        length = size if settings.stacked else 1
        group = arguments.group(length, settings, backward=False, in_place=not settings.stacked)
        _copy_network(arguments.fast, group)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out_batches = _mini_batches(out, settings.mini_batch_size)
        z_out = q.new_empty(tokens.q.shape) if keep else None
        carries: list[Tensor] = []
        for part in _parts(len(tokens.q), length):
            if keep and part.start > 0 and part.start % size == 0:
                carries += [w[0].clone() for w in (*group.weights, *group.biases)]
            group.load(Tokens(*(x[part] for x in tokens)), norm, initial)
            z = group.answer()
            if z_out is not None:
                z_out[part] = z
            normed, _, _ = normalise(z, settings.eps)
            torch.add(normed.mul_(norm.weight).add_(norm.bias), tokens.q[part], out=out_batches[part])
        last = [w[0].view(*q.shape[:2], *w.shape[2:]) for w in (*group.weights, *group.biases)]
        if keep:
            ctx.set_materialize_grads(False)
            ctx.settings, ctx.num_layers, ctx.num_tensors = settings, num_layers, len(tensors)
            ctx.save_for_backward(*tensors, z_out, *carries)
        return out, *([x.clone() for x in last] if settings.stacked else last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, num_layers = ctx.settings, ctx.num_layers
        saved = list(ctx.saved_tensors)  # once only: gradient checkpointing makes them again here
        arguments = _Arguments.of(saved[: ctx.num_tensors], num_layers)
        z_out, *carries = saved[ctx.num_tensors :]
        norm, initial = arguments.norm_rows(), arguments.initial_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        if dout is None:
            dout = torch.zeros_like(arguments.tokens[0])
        dout_batches = _mini_batches(dout, settings.mini_batch_size)
        dtokens = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments.tokens]
        dtoken_batches = _in_mini_batches(dtokens, settings.mini_batch_size)
        dfast = _gradients_to_move(arguments.fast, dlast)
        dinitial = None if initial is None else Network(*(tuple(map(torch.zeros_like, p)) for p in initial))
        dnorm = Norm(torch.zeros_like(norm.weight), torch.zeros_like(norm.bias))
        size = _group_size(len(tokens.q))
        group = arguments.group(size, settings, backward=True)
        way_back = GroupBackward(group, norm)
        for part in reversed(list(_parts(len(tokens.q), size))):
            first = 2 * num_layers * (part.start // size - 1)
            _copy_network(carries[first : first + 2 * num_layers] if part.start else arguments.fast, group)
            group.load(Tokens(*(x[part] for x in tokens)), norm, initial)
            group.learn()
            found = way_back.run(dout_batches[part].contiguous(), z_out[part], dfast, dinitial)
            for batches, gradient in zip(dtoken_batches, found.tokens, strict=True):
                batches[part] = gradient
            for total, gradient in zip(dnorm, found.norm, strict=True):
                total.add_(gradient)
        return None, None, None, *dtokens, *arguments.gradients(dnorm, dfast, dinitial)


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

    @property
    def rows(self) -> torch.Size:
        return self.tokens[0].shape[:2]  # B, H

    def group(self, size: int, settings: Settings, *, backward: bool, in_place: bool = False) -> Group:
        like, num_rows = self.tokens[0], self.rows.numel()
        return Group(self.dims, size, num_rows, settings, like, backward=backward, in_place=in_place)

    def norm_rows(self) -> Norm:
        return Norm(*(x.repeat(self.rows[0], 1, 1) for x in self.norm))

    def initial_rows(self) -> Network | None:
        if not self.initial:
            return None
        rows = [w.repeat(self.rows[0], 1, 1) for w in self.initial]
        return Network(tuple(rows[: len(rows) // 2]), tuple(rows[len(rows) // 2 :]))

    def gradients(self, norm: Norm, fast: Network, initial: Network | None) -> list[Tensor]:
        """Of everything but the tokens, in the order of the arguments."""

        def unflattened(x: Tensor) -> Tensor:
            return x.view(*self.rows, *x.shape[1:])

        of_initial = () if initial is None else (*initial.weights, *initial.biases)
        return [
            *(unflattened(x).sum(0) for x in norm),
            *map(unflattened, (*fast.weights, *fast.biases)),
            *(unflattened(x).sum(0) for x in of_initial),
        ]


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


def _copy_network(tensors: Sequence[Tensor], group: Group) -> None:
    """Fast weights `[B, H, ...]` or `[R, ...]` to the start of a group."""
    for stack, tensor in zip((*group.weights, *group.biases), tensors, strict=True):
        stack[0].view(tensor.shape).copy_(tensor)


def _gradients_to_move(fast: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Network:
    """Gradients of the last fast weights as `[R, ...]` that may be written to."""
    own = []
    for tensor, gradient in zip(fast, gradients, strict=True):
        copy = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        own.append((copy if gradient is None else copy.copy_(gradient)).flatten(0, 1))
    return Network(tuple(own[: len(own) // 2]), tuple(own[len(own) // 2 :]))
