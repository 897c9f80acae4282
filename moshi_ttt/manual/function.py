"""The inner loop as an autograd function over a sequence: key scan and reading, group by group.

Forward keeps what the layers make of keys and queries (`Tape`), and now and then the fast weights. From these
backward takes the steps of each group back, so that rounding does not add up over a long sequence.

Shapes: B batch rows, H heads, R = B * H, T tokens, C mini_batch_size, D head_dim, L tokens of a group.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moshi_ttt.config import InnerSettings
from moshi_ttt.manual.backward import ScanBackward
from moshi_ttt.manual.read import Reading, visible
from moshi_ttt.manual.scan import Keys, Network, Norm, Scan, Steps, Tape, commit

GROUPS_PER_COPY = 8  # of the fast weights


def group_length(head_dim: int, mini_batch_size: int) -> int:
    """Tokens of a group: the larger, the larger the products, and the more of them is read as a triangle."""
    return max(min(head_dim, 48) // mini_batch_size, 1) * mini_batch_size


class Learned(NamedTuple):
    """What a sequence leaves behind."""

    weights: tuple[Tensor, ...]  # after the last full mini-batch, layer l: [B, H, in_l, out_l]
    biases: tuple[Tensor, ...]  # layer l: [B, H, 1, out_l]
    inputs: tuple[Tensor, ...]  # of the tokens after it, all layers but the first one: [B, H, T % C, in_l]
    steps: tuple[Tensor, ...]  # layer l: [B, H, T % C, out_l]


def run_manual(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ln_weight: Tensor,
    ln_bias: Tensor,
    settings: InnerSettings,
) -> tuple[Tensor, Learned]:
    """Learn from and answer a sequence that starts with a mini-batch; first derivatives only.

    Args:
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`; all tensors of one dtype.
        weights, biases: fast weights before them, layer l: `[B, H, in, out]` and `[B, H, 1, out]`.
        ln_weight, ln_bias: inner LayerNorm, `[H, 1, D]`.
        settings: of the inner loop.

    Returns:
        Outputs `[B, H, T, D]`, and what is left behind.
    """
    tensors = (*tokens, ln_weight, ln_bias, *weights, *biases)
    out, *rest = _ManualInnerLoop.apply(settings, len(weights), needs_tape(tensors), *tensors)
    n = len(weights)
    parts = (rest[:n], rest[n : 2 * n], rest[2 * n : -n], rest[-n:])
    return out, Learned(*map(tuple, parts))


def needs_tape(tensors: Sequence[Tensor]) -> bool:
    """Whether a backward pass may follow; inside an autograd function nothing tells."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _ManualInnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: InnerSettings, num_layers: int, keep: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        sequence = _Sequence(tensors, settings, num_layers)
        q, norm = sequence.q, sequence.norm
        fast = Network(
            *([w.clone(memory_format=torch.contiguous_format) for w in part] for part in sequence.fast)
        )
        groups = list(sequence.groups())
        tape = sequence.tape(q.shape[1] if keep else min(q.shape[1], sequence.length))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        copies: list[Tensor] = []
        for index, part in enumerate(groups):
            if keep and index and index % GROUPS_PER_COPY == 0:
                copies += [w.clone() for w in (*fast.weights, *fast.biases)]
            own_tape = tape.part(part if keep else slice(part.stop - part.start))
            own = sequence.scan.learn(sequence.keys(part), fast, own_tape)
            sequence.reading(part, own, fast, own_tape).answer(norm, settings.eps, out[:, part])
            num_committed = sequence.num_committed(part)
            commit(fast, own.part(slice(num_committed)))
        last = [sequence.unflat(w) for w in (*fast.weights, *fast.biases)]
        pending = own.part(slice(num_committed, None))
        left = [sequence.unflat(x.clone()) for x in (*pending.inputs[1:], *pending.steps)]
        if keep:
            ctx.set_materialize_grads(False)
            ctx.settings, ctx.num_layers, ctx.num_tensors = settings, num_layers, len(tensors)
            ctx.save_for_backward(*tensors, *tape.z, *tape.zq, *copies, *last)
        return sequence.unflat(out), *last, *left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlearned: Tensor | None) -> tuple[Tensor | None, ...]:
        num_layers, settings = ctx.num_layers, ctx.settings
        saved = list(ctx.saved_tensors)  # once only: gradient checkpointing makes them again here
        sequence = _Sequence(saved[: ctx.num_tensors], settings, num_layers)
        del saved[: ctx.num_tensors]
        tape = Tape(saved[:num_layers], saved[num_layers : 2 * num_layers])
        copies = saved[2 * num_layers :]
        dout = torch.zeros_like(sequence.q) if dout is None else dout.flatten(0, 1)
        dfast = _gradients_to_move(sequence.fast, dlearned[: 2 * num_layers])
        dtokens = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in sequence.tokens]
        dq, dk, dv, deta = dtokens
        dnorm = Norm(*(torch.zeros_like(x) for x in sequence.norm))
        groups = list(sequence.groups())
        fast = Network([], [])
        for index, part in reversed(list(enumerate(groups))):
            is_last = index + 1 == len(groups)
            if is_last or (index + 1) % GROUPS_PER_COPY == 0:
                fast = _network([w.clone() for w in copies[-2 * num_layers :]], sequence.q.shape[0])
                del copies[-2 * num_layers :]
            committed = sequence.num_committed(part)
            back = ScanBackward(sequence.scan, sequence.keys(part), fast, tape.part(part), committed)
            gradients = back.begin(dfast)
            reading = sequence.reading(part, back.steps, fast, tape.part(part))
            dq[:, part] = reading.back(dout[:, part], sequence.norm, settings.eps, gradients, dfast, dnorm)
            if is_last:
                add_pending(gradients.part(slice(committed, None)), dlearned[2 * num_layers :])
            found = back.run(gradients, dfast, dnorm)
            torch.sub(found.k, found.target, out=dk[:, part])
            dv[:, part], deta[:, part] = found.target, found.eta
        return None, None, None, *sequence.gradients(dtokens, dnorm, dfast)


class _Sequence:
    """The tensors that autograd sees, by rows of batch and head, and how they fall into groups."""

    def __init__(self, tensors: Sequence[Tensor], settings: InnerSettings, num_layers: int) -> None:
        self.rows = tensors[0].shape[:2]  # B, H
        q, k, v, eta = (x.flatten(0, 1) for x in tensors[:4])
        self.tokens = q, k, v, eta[..., None]
        self.q = q
        self.norm = Norm(*(x.repeat(self.rows[0], 1, 1) for x in tensors[4:6]))
        self.fast = _network(tensors[6:], self.rows.numel())
        self.settings, self.scan = settings, Scan(settings, self.norm)
        size = settings.mini_batch_size
        self.length = group_length(q.shape[2], size)
        self._sees = visible(self.length, size, causal=settings.causal, like=q)

    def groups(self) -> Iterator[slice]:
        """The tokens of each group."""
        num_tokens = self.q.shape[1]
        for start in range(0, num_tokens, self.length):
            yield slice(start, min(start + self.length, num_tokens))

    def num_committed(self, part: slice) -> int:
        """Tokens of the full mini-batches of a group."""
        length = part.stop - part.start
        return length - length % self.settings.mini_batch_size

    def keys(self, part: slice) -> Keys:
        """What a group learns from."""
        _, k, v, eta = (x[:, part] for x in self.tokens)
        return Keys(k, v - k, eta)

    def reading(self, part: slice, own: Steps, fast: Network, tape: Tape) -> Reading:
        """The queries of a group."""
        length = part.stop - part.start
        sees = self._sees[:length, :length]
        return Reading(self.q[:, part], own, fast, sees, tape.zq, self.scan.elementwise)

    def tape(self, length: int) -> Tape:
        """Room for the tape of so many tokens."""
        shapes = [(self.q.shape[0], length, w.shape[2]) for w in self.fast.weights]
        return Tape(*([self.q.new_empty(shape) for shape in shapes] for _ in range(2)))

    def unflat(self, x: Tensor) -> Tensor:
        """`[R, ...]` to `[B, H, ...]`."""
        return x.unflatten(0, self.rows)

    def gradients(self, tokens: Sequence[Tensor], norm: Norm, fast: Network) -> list[Tensor]:
        """In the order and the shapes of the arguments."""
        q, k, v, eta = (self.unflat(x) for x in tokens)
        norms = (self.unflat(x).sum(0) for x in norm)
        return [q, k, v, eta[..., 0], *norms, *(self.unflat(x) for part in fast for x in part)]


def _network(tensors: Sequence[Tensor], num_rows: int) -> Network:
    """Weights, then biases, as `[R, ...]`."""
    rows = [x.reshape(num_rows, *x.shape[-2:]) for x in tensors]
    return Network(rows[: len(rows) // 2], rows[len(rows) // 2 :])


def _gradients_to_move(fast: Network, gradients: Sequence[Tensor | None]) -> Network:
    """Gradients of the last fast weights as `[R, ...]` that may be written to."""
    own = []
    for tensor, gradient in zip((*fast.weights, *fast.biases), gradients, strict=True):
        copy = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        own.append(copy if gradient is None else copy.copy_(gradient.flatten(0, 1)))
    return Network(own[: len(own) // 2], own[len(own) // 2 :])


def add_pending(gradients: Steps, more: Sequence[Tensor | None]) -> None:
    """What comes back through the pending tokens, `[B, H, T % C, _]`."""
    for total, gradient in zip((*gradients.inputs[1:], *gradients.steps), more, strict=True):
        if gradient is not None:
            total.add_(gradient.flatten(0, 1))
