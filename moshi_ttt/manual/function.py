"""The manual inner loop as an autograd function over a sequence of full mini-batches.

Forward keeps what the fast weights were multiplied with (`Tape`), and the fast weights after every group of
mini-batches. From these backward takes the steps of the group back, so that rounding does not add up over a
long sequence.

Shapes: B batch rows, H heads, R = B * H, T tokens, C mini_batch_size, D head_dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.config import InnerSettings
from moshi_ttt.manual.backward import GroupBackward
from moshi_ttt.manual.elementwise import normalise
from moshi_ttt.manual.group import Group, Network, Norm, Tape, Tokens

GROUP_SIZE = 8  # mini-batches


def run_manual(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    settings: InnerSettings,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Learn from and answer full mini-batches; first derivatives only.

    Args:
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`, T a multiple of C; all tensors of one dtype.
        weights, biases: fast weights before them, layer l: `[B, H, in, out]` and `[B, H, 1, out]`.
        ln_weight, ln_bias: inner LayerNorm, `[H, 1, D]`.
        settings: of the inner loop.

    Returns:
        Outputs `[B, H, T, D]`, and the fast weights and biases after the last token.
    """
    tensors = (*tokens, ln_weight, ln_bias, *weights, *biases)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    out, *last = _ManualInnerLoop.apply(settings, len(weights), keep, *tensors)
    return out, tuple(last[: len(weights)]), tuple(last[len(weights) :])


class _ManualInnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: InnerSettings, num_layers: int, keep: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        arguments = _Arguments(tensors, num_layers)
        q, norm = arguments.tokens[0], arguments.norm_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        num_batches = len(tokens.q)
        tape = arguments.tape(num_batches if keep else 1, settings)
        group = arguments.group(1, settings, norm, backward=False)
        fast = _network([w.clone(memory_format=torch.contiguous_format) for w in arguments.fast])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out_batches = _mini_batches(out, settings.mini_batch_size)
        after_groups: list[Tensor] = []
        for n in range(num_batches):
            part = slice(n, n + 1)
            group.load(Tokens(*(x[part] for x in tokens)), tape.part(part) if keep else tape)
            normed, _, _ = normalise(group.answer(fast), settings.eps)
            torch.add(normed.mul_(norm.weight).add_(norm.bias), tokens.q[part], out=out_batches[part])
            if keep and (n + 1) % GROUP_SIZE == 0 and n + 1 < num_batches:
                after_groups += [w.clone() for w in (*fast.weights, *fast.biases)]
        last = [w.view(*arguments.rows, *w.shape[1:]) for w in (*fast.weights, *fast.biases)]
        if keep:
            ctx.set_materialize_grads(False)
            ctx.settings, ctx.num_layers, ctx.num_tensors = settings, num_layers, len(tensors)
            tape_tensors = (tape.z_first, *tape.z, *tape.zq, *tape.u)
            ctx.save_for_backward(*tensors, *tape_tensors, *after_groups, *last)
        return out, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        settings, num_layers = ctx.settings, ctx.num_layers
        saved = list(ctx.saved_tensors)  # once only: gradient checkpointing makes them again here
        arguments = _Arguments(saved[: ctx.num_tensors], num_layers)
        hidden = num_layers - 1
        z_first, *saved = saved[ctx.num_tensors :]
        tape = Tape(z_first, saved[:hidden], saved[hidden : 2 * hidden], saved[2 * hidden : 3 * hidden])
        after_groups = saved[3 * hidden :]
        norm = arguments.norm_rows()
        tokens = _in_mini_batches(arguments.tokens, settings.mini_batch_size)
        if dout is None:
            dout = torch.zeros_like(arguments.tokens[0])
        dout_batches = _mini_batches(dout, settings.mini_batch_size)
        dtokens = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments.tokens]
        dtoken_batches = _in_mini_batches(dtokens, settings.mini_batch_size)
        fast = _network([torch.empty_like(w, memory_format=torch.contiguous_format) for w in arguments.fast])
        dfast = _gradients_to_move(arguments.fast, dlast)
        dnorm = Norm(torch.zeros_like(norm.weight), torch.zeros_like(norm.bias))
        num_batches = len(tokens.q)
        group = arguments.group(min(GROUP_SIZE, num_batches), settings, norm, backward=True)
        backward = GroupBackward(group)
        for index, start in reversed(list(enumerate(range(0, num_batches, GROUP_SIZE)))):
            part = slice(start, start + GROUP_SIZE)
            after = after_groups[2 * num_layers * index : 2 * num_layers * (index + 1)]
            for own, kept in zip((*fast.weights, *fast.biases), after, strict=True):
                own.copy_(kept.view(own.shape))
            group.load(Tokens(*(x[part] for x in tokens)), tape.part(part))
            found = backward.run(dout_batches[part].contiguous(), fast, dfast)
            for batches, gradient in zip(dtoken_batches, found.tokens, strict=True):
                batches[part] = gradient
            for total, gradient in zip(dnorm, found.norm, strict=True):
                total.add_(gradient)
        return None, None, None, *dtokens, *arguments.gradients(dnorm, dfast)


class _Arguments:
    """The tensors that autograd sees, sorted: tokens, norm `[H, 1, D]`, fast weights and biases."""

    def __init__(self, tensors: Sequence[Tensor], num_layers: int) -> None:
        self.tokens = tensors[:4]  # q, k, v [B, H, T, D], eta [B, H, T]
        self.norm, self.fast = tensors[4:6], tensors[6:]
        self.rows = self.tokens[0].shape[:2]  # B, H
        weights = self.fast[:num_layers]
        self.dims = [weights[0].shape[-2], *(w.shape[-1] for w in weights)]

    def group(self, size: int, settings: InnerSettings, norm: Norm, *, backward: bool) -> Group:
        return Group(self.dims, size, self.rows.numel(), settings, norm, backward=backward)

    def tape(self, length: int, settings: InnerSettings) -> Tape:
        c, like = settings.mini_batch_size, self.tokens[0]
        return Tape.empty(self.dims, length, self.rows.numel(), c, like)

    def norm_rows(self) -> Norm:
        return Norm(*(x.repeat(self.rows[0], 1, 1) for x in self.norm))

    def gradients(self, norm: Norm, fast: Network) -> list[Tensor]:
        """Of everything but the tokens, in the order of the arguments."""
        norms = (x.view(*self.rows, *x.shape[1:]).sum(0) for x in norm)
        return [*norms, *(x.view(*self.rows, *x.shape[1:]) for x in (*fast.weights, *fast.biases))]


def _mini_batches(x: Tensor, size: int) -> Tensor:
    """`[B, H, T, D]` to `[T / C, R, C, D]`, a view of a contiguous x."""
    return x.flatten(0, 1).unflatten(1, (-1, size)).transpose(0, 1)


def _in_mini_batches(tokens: Sequence[Tensor], size: int) -> Tokens:
    q, k, v, eta = tokens
    return Tokens(*(_mini_batches(x, size) for x in (q, k, v, eta[..., None])))


def _network(tensors: Sequence[Tensor]) -> Network:
    """Weights, then biases, `[B, H, ...]`, as `[R, ...]`."""
    rows = [x.flatten(0, 1) for x in tensors]
    return Network(rows[: len(rows) // 2], rows[len(rows) // 2 :])


def _gradients_to_move(fast: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Network:
    """Gradients of the last fast weights as `[R, ...]` that may be written to."""
    own = []
    for tensor, gradient in zip(fast, gradients, strict=True):
        copy = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        own.append(copy if gradient is None else copy.copy_(gradient))
    return _network(own)
