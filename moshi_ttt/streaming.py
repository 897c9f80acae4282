"""The TTT state of a conversation: frame by frame or in blocks, rows independent, updated in place.

Every operation has fixed shapes, writes into buffers that stay where they are, and decides by masks
instead of branches on values, so that a step can be captured in a CUDA graph and replayed. Only the CPU
asks first whether a pass over all fast weights is due, see `TTTStreamingState.branch_free`.

A step reads the fast weights of the first inner layer once and those of the others three times: for the
key, for its gradient on the way back, and for the query, which needs that gradient.

Shapes: B batch rows, H heads, C mini_batch_size, t tokens of a block (at most C), D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from moshi.modules.streaming import State
from torch import Tensor

from moshi_ttt.inner_loop import InnerLoop, TTTState, initial_state
from moshi_ttt.inputs.key_shift import HeardKeys, no_keys


@dataclass
class TTTStreamingState(State):
    """Fast weights and the half-finished mini-batch of each row, in buffers of fixed size.

    Slots of the mini-batch that hold no token yet have gradient zero and so contribute nothing.

    Args:
        inner: `W0` and the settings of the inner loop.
        key_shift: of the layer.

    Attributes:
        heard: keys of the last frames of each row, None without key shift.
        buffers: fast weights at the start of the mini-batch in progress, and its C slots.
        offsets: slots in use, 0 to C - 1, `[B]`.
        num_tokens: tokens heard since the last reset, `[B]`.
        num_broken: how often a row was reset because it was no longer finite, `[B]`.
        activity: size of the last gated update relative to the residual stream, `[B]`; written by the
            hybrid layer.
        branch_free: commit and reset by masked passes over all fast weights in every step, on the CPU too. A
            CUDA graph needs that form; the CPU otherwise leaves out the passes that would change nothing.
    """

    branch_free: ClassVar[bool] = False

    inner: InnerLoop
    key_shift: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        state = initial_state(self.inner.weights, self.inner.biases, self.batch_size)
        slots = (self.batch_size, state.start_weights[0].shape[1], self.mini_batch_size)
        self.buffers = TTTState(
            tuple(_own_copy(w) for w in state.start_weights),
            tuple(b.clone() for b in state.start_biases),
            tuple(w.new_zeros(*slots, w.shape[2]) for w in state.start_weights),
            tuple(w.new_zeros(*slots, w.shape[3]) for w in state.start_weights),
        )
        self.offsets = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.heard = no_keys(self.buffers.pending_inputs[0], self.key_shift) if self.key_shift else None
        self.num_tokens = torch.zeros_like(self.offsets)
        self.num_broken = torch.zeros_like(self.offsets)
        self.activity = torch.zeros(self.batch_size, dtype=self.inner.dtype, device=self.device)

    @property
    def mini_batch_size(self) -> int:
        """C."""
        return self.inner.settings.mini_batch_size

    @property
    def _initial(self) -> tuple[Tensor, ...]:
        return (*self.inner.weights, *self.inner.biases)

    def row(self, index: int) -> TTTState:
        """What one row holds now, as views of the buffers. Waits for the device.

        Returns:
            Fast weights at the start of the mini-batch in progress, and its slots in use, with B = 1.
        """
        slots = slice(int(self.offsets[index]))
        weights, biases, inputs, gradients = (
            tuple(buffer[index : index + 1] for buffer in buffers) for buffers in self.buffers
        )
        return TTTState(
            weights, biases, tuple(x[:, :, slots] for x in inputs), tuple(g[:, :, slots] for g in gradients)
        )

    def reset(self, reset_mask: Tensor) -> None:
        """Forget: rows of `reset_mask` `[B]` go back to `W0` and the start of a mini-batch."""
        super().reset(reset_mask)
        self.forget(reset_mask)
        for counter in (self.num_broken, self.activity):
            counter.copy_(torch.where(reset_mask, 0, counter))

    def forget(self, rows: Tensor) -> None:
        """Give rows `[B]` fresh fast weights, whatever theirs hold; a product with 0 would keep NaN."""
        wide = rows.view(-1, 1, 1, 1)
        start = (*self.buffers.start_weights, *self.buffers.start_biases)
        for buffer, initial in zip(start, self._initial, strict=True):
            if not buffer.is_contiguous():  # the other way round it is; a compiler wants that of `out`
                buffer, initial = buffer.mT, initial.mT
            torch.where(wide, initial, buffer, out=buffer)
        self._empty_slots(rows)
        for counter in (self.offsets, self.num_tokens):
            counter.copy_(torch.where(rows, 0, counter))
        if self.heard is not None:
            self.heard.keys.copy_(torch.where(wide, 0, self.heard.keys))
            self.heard.num_heard.copy_(torch.where(rows, 0, self.heard.num_heard))

    def heard_frames(self, token_mask: Tensor | None, num_frames: int) -> Tensor | None:
        """Which of the next frames are heard: no padding, in the rows of `exec_mask`. `[B, T]`, None: all.

        Without key shift only padding matters: what does not execute is not learned from anyway.
        """
        if self.heard is None:
            return token_mask
        executes = self.exec_mask[:, None].expand(-1, num_frames)
        return executes if token_mask is None else executes & token_mask

    def hear(self, heard: HeardKeys) -> None:
        """Keep the keys that the frames after the coming step need."""
        assert self.heard is not None
        for buffer, new in zip(self.heard, heard, strict=True):
            buffer.copy_(new)

    def step(self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Learn from a block of tokens and answer them; rows outside `exec_mask` learn nothing.

        A row whose fast weights, gradients or output are no longer finite goes back to `W0` and is counted
        in `num_broken`; the other rows do not notice.

        Args:
            q, k, v: `[B, H, t, D]`.
            eta: `[B, H, t]`.

        Returns:
            Output `[B, H, t, D]`, and which of its tokens are finite, `[B, t]`.
        """
        num_tokens = q.shape[2]
        assert num_tokens <= self.mini_batch_size
        slots = self.offsets[:, None] + torch.arange(num_tokens, device=self.device)  # [B, t]
        z = self._learn_and_read(q, k, v, eta, slots)
        self._commit_full_rows(num_tokens)
        is_next = slots >= self.mini_batch_size
        if num_tokens > 1 and self._is_due(is_next):
            # In some rows the block reaches into the next mini-batch, which starts at new fast weights.
            z_next = self._learn_and_read(q, k, v, eta, slots - self.mini_batch_size)
            z = torch.where(is_next[:, None, :, None], z_next, z)
        heard = self.exec_mask * num_tokens
        self.offsets.add_(heard).remainder_(self.mini_batch_size)
        self.num_tokens.add_(heard)

        out = q + self.inner.layer_norm(z)
        # A query reads all fast weights and every step up to its own, and the LayerNorm spreads what is not
        # finite over the head: what a row holds needs no look of its own.
        finite = out.abs().amax((1, 3)) < torch.inf  # [B, t]
        broken = self.exec_mask & ~finite.all(1)
        if self._is_due(broken):
            self.forget(broken)
            self.num_broken.add_(broken)
        return out, finite

    def _is_due(self, rows: Tensor) -> bool:
        """Whether to do what concerns only the marked rows, `[B]` or `[B, t]`.

        The CPU knows what is in the mask; a GPU would have to be waited for, and a graph cannot branch.
        """
        return self.branch_free or self.device.type != "cpu" or bool(rows.any())

    def _learn_and_read(self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, slots: Tensor) -> Tensor:
        """Put tokens into their slots (those outside 0 .. C - 1 into none) and answer the queries.

        The same as `InnerLoop.token_gradients` and `InnerLoop.read`, with fewer passes over the weights.

        Args:
            slots: consecutive in each row, `[B, t]`.

        Returns:
            Output of the inner MLP `[B, H, t, D]`.
        """
        weights, biases, pending_inputs, pending_gradients = self.buffers
        # Biases come first in the sums: these take the layout of their first term.
        both = _scalar_products(torch.cat((k, q), 2), weights[0].mT)
        z, z_query = biases[0] + both[:, :, : k.shape[2]], biases[0] + both[:, :, k.shape[2] :]
        inputs, zs = [k], [z]
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            inputs.append(F.gelu(zs[-1], approximate="tanh"))
            zs.append(bias + _scalar_products(inputs[-1], weight.mT))
        gradients = [self.inner.output_gradient(zs[-1], v - k) * eta[..., None]]
        for weight, z in zip(weights[:0:-1], zs[-2::-1], strict=True):
            gradient = gradients[0] @ weight.mT
            gradients.insert(0, torch.ops.aten.gelu_backward(gradient, z, approximate="tanh"))
        self._fill_slots(slots, (*inputs, *gradients))

        visible = None  # a single query reads all slots in use: its own is the last one
        if slots.shape[1] > 1:
            numbers = torch.arange(self.mini_batch_size, device=self.device)
            visible = (numbers <= slots[:, :, None])[:, None]  # [B, 1, t, C]
        x, z = q, z_query
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if layer > 0:
                x = F.gelu(z, approximate="tanh")
                z = bias + _scalar_products(x, weight.mT)
            attention = _scalar_products(x, pending_inputs[layer]) + 1  # [B, H, t, C]
            if visible is not None:
                attention = torch.where(visible, attention, 0)
            z = z - attention @ pending_gradients[layer]
        return z

    def _fill_slots(self, slots: Tensor, tokens: Sequence[Tensor]) -> None:
        """Write the inputs, then the gradients of all layers, `[B, H, t, _]`, of the rows that execute.

        Args:
            slots: consecutive in each row, `[B, t]`; tokens outside 0 .. C - 1 are left out.
        """
        size = self.mini_batch_size
        inside = slots % size  # of at most C tokens no two meet, so those left out can rewrite what is there
        is_new = (inside == slots) & self.exec_mask[:, None]
        some_left_out = self._is_due(~is_new)
        heads = torch.arange(tokens[0].shape[:2].numel(), device=self.device).view(*tokens[0].shape[:2], 1)
        places = (heads * size + inside[:, None]).flatten()  # [B * H * t]
        buffers = (*self.buffers.pending_inputs, *self.buffers.pending_gradients)
        for buffer, new in zip(buffers, tokens, strict=True):
            lines = buffer.view(-1, buffer.shape[3])  # [B * H * C, _]
            if some_left_out:
                old = lines.index_select(0, places).view(new.shape)
                new = torch.where(is_new[:, None, :, None], new, old)
            lines.index_copy_(0, places, new.flatten(0, 2))

    def _commit_full_rows(self, num_tokens: int) -> None:
        """Apply the steps of the mini-batches that the block fills, in place, and empty their slots."""
        full = self.exec_mask & (self.offsets + num_tokens >= self.mini_batch_size)
        if not self._is_due(full):
            return
        wide = full.view(-1, 1, 1, 1)
        weights, biases, inputs, gradients = self.buffers
        some_stay = self._is_due(~full)
        for weight, bias, x, gradient in zip(weights, biases, inputs, gradients, strict=True):
            if some_stay:
                gradient = torch.where(wide, gradient, 0)
            weight.mT.flatten(0, 1).baddbmm_(gradient.flatten(0, 1).mT, x.flatten(0, 1), alpha=-1)
            bias.sub_(gradient.sum(2, keepdim=True))
        state_decay = self.inner.settings.state_decay
        if state_decay is not None:
            share = wide.to(self.inner.dtype) * state_decay
            for current, initial in zip((*weights, *biases), self._initial, strict=True):
                current.lerp_(initial, share)
        self._empty_slots(full)

    def _empty_slots(self, rows: Tensor) -> None:
        """Clear the mini-batch in progress of the rows `[B]`."""
        some_stay = self._is_due(~rows)
        for buffer in (*self.buffers.pending_inputs, *self.buffers.pending_gradients):
            if some_stay:
                buffer.masked_fill_(rows.view(-1, 1, 1, 1), 0)
            else:
                buffer.zero_()


def _own_copy(weight: Tensor) -> Tensor:
    """A copy of `[B, H, in, out]`, on the CPU with the weights of each output side by side in memory."""
    if weight.device.type != "cpu":
        return weight.clone()
    return weight.mT.clone(memory_format=torch.contiguous_format).mT


def _scalar_products(x: Tensor, lines: Tensor) -> Tensor:
    """`x L^T`, of `[B, H, t, D]` with the lines `[B, H, n, D]`, `[B, H, t, n]`."""
    # In this order a CPU multiplies one token at the speed at which it reads the lines from memory.
    products = torch.bmm(lines.flatten(0, 1), x.flatten(0, 1).mT)  # [B * H, n, t]
    return products.view(*lines.shape[:3], -1).mT


def stream_blocks(
    state: TTTStreamingState,
    tokens: Sequence[Tensor],
    *,
    before_block: Callable[[slice], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`TTTStreamingState.step` over any number of tokens, in blocks of at most C.

    Args:
        state: updated.
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`.
        before_block: called with the place of each block among the tokens, before the state learns from it.

    Returns:
        Output `[B, H, T, D]`, and which of its tokens are finite, `[B, T]`.
    """
    outputs, finite = [], []
    for start in range(0, tokens[0].shape[2], state.mini_batch_size):
        block = slice(start, start + state.mini_batch_size)
        if before_block is not None:
            before_block(block)
        out, is_finite = state.step(*(part[:, :, block] for part in tokens))
        outputs.append(out)
        finite.append(is_finite)
    return torch.cat(outputs, 2), torch.cat(finite, 1)
