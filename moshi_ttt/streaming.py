"""The TTT state of a conversation: one frame at a time, rows independent, buffers updated in place.

Shapes: B batch rows, H heads, C mini_batch_size, D head_dim.
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

    Slots of the mini-batch that hold no token yet have gradient zero and so contribute nothing, which is
    why no mask is needed and rows may stand at different places.

    Args:
        inner: `W0` and the settings of the inner loop.
        mini_batch_size: C.
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
        self.offsets = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)  # 0 .. C - 1

    def reset(self, reset_mask: Tensor) -> None:
        """Forget: rows of `reset_mask` `[B]` go back to `W0` and the start of a mini-batch."""
        super().reset(reset_mask)
        rows = reset_mask.view(-1, 1, 1, 1)
        self._start_mini_batch(rows, self.inner.weights, self.inner.biases)
        self.offsets.copy_(torch.where(reset_mask, 0, self.offsets))

    def step(self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor) -> Tensor:
        """Learn from one token and answer it; rows outside `exec_mask` learn nothing.

        Args:
            q, k, v: `[B, H, 1, D]`.
            eta: `[B, H, 1]`.

        Returns:
            Output `[B, H, 1, D]`.
        """
        inner, buffers = self.inner, self.buffers
        inputs, gradients = inner.token_gradients(k, v, eta, buffers.start_weights, buffers.start_biases)
        slots = torch.arange(self.mini_batch_size, device=self.device)
        here = (slots == self.offsets[:, None]) & self.exec_mask[:, None]  # [B, C]
        here = here[:, None, :, None]
        slot_buffers = (*buffers.pending_inputs, *buffers.pending_gradients)
        for buffer, token in zip(slot_buffers, (*inputs, *gradients), strict=True):
            buffer.copy_(torch.where(here, token, buffer))
        out = q + inner.layer_norm(inner.read(q, buffers, diagonal=None))
        self._commit_full_rows()
        return out

    def _commit_full_rows(self) -> None:
        full = self.exec_mask & (self.offsets == self.mini_batch_size - 1)
        rows = full.view(-1, 1, 1, 1)
        committed = self.inner.commit(self.buffers)
        self._start_mini_batch(rows, committed.start_weights, committed.start_biases)
        advanced = torch.where(full, 0, self.offsets + 1)
        self.offsets.copy_(torch.where(self.exec_mask, advanced, self.offsets))

    def _start_mini_batch(self, rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        """Give the rows `[B, 1, 1, 1]` these fast weights and empty slots."""
        start = (*self.buffers.start_weights, *self.buffers.start_biases)
        for buffer, value in zip(start, (*weights, *biases), strict=True):
            buffer.copy_(torch.where(rows, value, buffer))
        for buffer in (*self.buffers.pending_inputs, *self.buffers.pending_gradients):
            buffer.copy_(torch.where(rows, 0, buffer))
