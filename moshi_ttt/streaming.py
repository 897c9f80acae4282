"""The TTT state of a conversation: frame by frame or in blocks, rows independent, updated in place.

Every operation has fixed shapes, writes into buffers that stay where they are, and decides by masks
instead of branches on values, so that a step can be captured in a CUDA graph and replayed.

Shapes: B batch rows, H heads, C mini_batch_size, t tokens of a block (at most C), D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moshi.modules.streaming import State
from torch import Tensor

from moshi_ttt.inner_loop import InnerLoop, TTTState, initial_state


@dataclass
class TTTStreamingState(State):
    """Fast weights and the half-finished mini-batch of each row, in buffers of fixed size.

    Slots of the mini-batch that hold no token yet have gradient zero and so contribute nothing.

    Args:
        inner: `W0` and the settings of the inner loop.
        mini_batch_size: C.

    Attributes:
        buffers: fast weights at the start of the mini-batch in progress, and its C slots.
        offsets: slots in use, 0 to C - 1, `[B]`.
        num_tokens: tokens heard since the last reset, `[B]`.
        num_broken: how often a row was reset because it was no longer finite, `[B]`.
        activity: size of the last gated update relative to the residual stream, `[B]`; written by the
            hybrid layer.
    """

    inner: InnerLoop
    mini_batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        state = initial_state(self.inner.weights, self.inner.biases, self.batch_size)
        slots = (self.batch_size, state.start_weights[0].shape[1], self.mini_batch_size)
        self.buffers = TTTState(
            tuple(w.clone() for w in state.start_weights),
            tuple(b.clone() for b in state.start_biases),
            tuple(w.new_zeros(*slots, w.shape[2]) for w in state.start_weights),
            tuple(w.new_zeros(*slots, w.shape[3]) for w in state.start_weights),
        )
        self.offsets = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.num_tokens = torch.zeros_like(self.offsets)
        self.num_broken = torch.zeros_like(self.offsets)
        self.activity = torch.zeros(self.batch_size, dtype=self.inner.dtype, device=self.device)

    @property
    def _initial(self) -> tuple[Tensor, ...]:
        return (*self.inner.weights, *self.inner.biases)

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
            torch.where(wide, initial, buffer, out=buffer)
        self._empty_slots(wide)
        for counter in (self.offsets, self.num_tokens):
            counter.copy_(torch.where(rows, 0, counter))

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
        z, healthy = self._learn_and_read(q, k, v, eta, slots)
        self._commit_full_rows(num_tokens)
        if num_tokens > 1:
            # In some rows the block reaches into the next mini-batch, which starts at new fast weights.
            is_next = slots >= self.mini_batch_size
            z_next, healthy_next = self._learn_and_read(q, k, v, eta, slots - self.mini_batch_size)
            z = torch.where(is_next[:, None, :, None], z_next, z)
            healthy = healthy & healthy_next
        advanced = (self.offsets + num_tokens) % self.mini_batch_size
        self.offsets.copy_(torch.where(self.exec_mask, advanced, self.offsets))
        self.num_tokens.add_(self.exec_mask * num_tokens)

        out = q + self.inner.layer_norm(z)
        finite = out.isfinite().all(3).all(1)  # [B, t]
        broken = self.exec_mask & ~(healthy & finite.all(1))
        self.forget(broken)
        self.num_broken.add_(broken)
        return out, finite

    def _learn_and_read(
        self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Put tokens into their slots (those outside 0 .. C - 1 into none) and answer the queries.

        Args:
            slots: consecutive in each row, `[B, t]`.

        Returns:
            Output of the inner MLP `[B, H, t, D]`, and whether all that was learned is finite, `[B]`.
        """
        inner, buffers = self.inner, self.buffers
        inputs, gradients = inner.token_gradients(k, v, eta, buffers.start_weights, buffers.start_biases)
        numbers = torch.arange(self.mini_batch_size, device=self.device)
        token_of_slot = numbers - slots[:, :1]  # [B, C]
        is_new = (token_of_slot >= 0) & (token_of_slot < slots.shape[1]) & self.exec_mask[:, None]
        healthy = torch.ones_like(self.exec_mask)
        slot_buffers = (*buffers.pending_inputs, *buffers.pending_gradients)
        for buffer, tokens in zip(slot_buffers, (*inputs, *gradients), strict=True):
            buffer.copy_(torch.where(is_new[:, None, :, None], _pick(tokens, token_of_slot), buffer))
            largest = torch.linalg.vector_norm(buffer, torch.inf, dim=(1, 2, 3))
            healthy = healthy & largest.isfinite()
        visible = None  # a single query reads all slots in use: its own is the last one
        if slots.shape[1] > 1:
            visible = (numbers <= slots[:, :, None])[:, None]  # [B, 1, t, C]
        return inner.read(q, buffers, visible=visible), healthy

    def _commit_full_rows(self, num_tokens: int) -> None:
        """Apply the steps of the mini-batches that the block fills, in place, and empty their slots."""
        full = self.exec_mask & (self.offsets + num_tokens >= self.mini_batch_size)
        wide = full.view(-1, 1, 1, 1)
        weights, biases, inputs, gradients = self.buffers
        for weight, bias, x, gradient in zip(weights, biases, inputs, gradients, strict=True):
            applied = torch.where(wide, gradient, 0)
            weight.flatten(0, 1).baddbmm_(x.flatten(0, 1).mT, applied.flatten(0, 1), alpha=-1)
            bias.sub_(applied.sum(2, keepdim=True))
        if self.inner.state_decay is not None:
            share = wide * self.inner.state_decay
            for current, initial in zip((*weights, *biases), self._initial, strict=True):
                current.lerp_(initial, share.to(current))
        self._empty_slots(wide)

    def _empty_slots(self, rows: Tensor) -> None:
        """Clear the mini-batch in progress of the rows `[B, 1, 1, 1]`."""
        for buffer in (*self.buffers.pending_inputs, *self.buffers.pending_gradients):
            buffer.masked_fill_(rows, 0)


def _pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, H, t, D]` by their index `[B, C]`, anything where it is out of range. `[B, H, C, D]`."""
    last = tokens.shape[2] - 1
    if last == 0:
        return tokens  # broadcast over the slots
    index = index.clamp(0, last)[:, None, :, None]
    return tokens.gather(2, index.expand(-1, tokens.shape[1], -1, tokens.shape[3]))


def stream_blocks(state: TTTStreamingState, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`TTTStreamingState.step` over any number of tokens, in blocks of at most C.

    Args:
        state: updated.
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`.

    Returns:
        Output `[B, H, T, D]`, and which of its tokens are finite, `[B, T]`.
    """
    blocks = zip(*(part.split(state.mini_batch_size, 2) for part in tokens), strict=True)
    outputs, finite = zip(*(state.step(*block) for block in blocks), strict=True)
    return torch.cat(outputs, 2), torch.cat(finite, 1)
