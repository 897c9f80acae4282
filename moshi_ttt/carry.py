"""Memory from one training chunk of a recording to the next, truncated backpropagation in between.

Shapes: B batch rows, H heads, D head_dim, C mini_batch_size, T frames of the chunk, G = frames of the grid.
"""

from collections.abc import Sequence
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from moshi_ttt.config import TTTConfig
from moshi_ttt.inner_loop import InnerLoop, TTTState
from moshi_ttt.inputs.key_shift import HeardKeys, no_keys


class TTTCarry(NamedTuple):
    """What one TTT layer remembers of the chunks before, detached, one set per batch row.

    The fast weights are kept as their distance from `W0`, so that `W0` gets its gradient in every chunk. Of
    a half-finished mini-batch the tokens are kept, and their inner gradients are taken again in the next
    chunk: an outer step in between changes them.
    """

    weights: tuple[Tensor, ...]  # distance from W0, layer l: [B, H, in_l, out_l]
    biases: tuple[Tensor, ...]  # distance from b0, layer l: [B, H, 1, out_l]
    k: Tensor  # [B, H, C, D], the first num_pending of each row count
    v: Tensor  # [B, H, C, D]
    eta: Tensor  # [B, H, C]
    heard: HeardKeys | None  # keys of the last frames, None without key shift
    num_pending: tuple[int, ...]  # per row, less than C; on the host, so that nothing waits for the device


class NewFrames(NamedTuple):
    """Which frames of a pass are new; the others are context, which is attended to but teaches nothing.

    The new ones are consecutive and as many in every row: S = T + the context before and after them.
    """

    first: tuple[int, ...]  # of each row; on the host, see TTTCarry
    num_frames: int  # T

    def of(self, x: Tensor) -> Tensor:
        """The new frames, `[B, S, ...]` to `[B, T, ...]`."""
        parts = [row[first : first + self.num_frames] for row, first in zip(x, self.first, strict=True)]
        return torch.stack(parts)

    def others(self, x: Tensor) -> Tensor:
        """The context, `[B, S, ...]` to `[B, S - T, ...]`."""
        parts = [
            torch.cat([row[:first], row[first + self.num_frames :]])
            for row, first in zip(x, self.first, strict=True)
        ]
        return torch.stack(parts)

    def join(self, new: Tensor, others: Tensor) -> Tensor:
        """What `of` and `others` took apart."""
        rows = zip(new, others, self.first, strict=True)
        return torch.stack([torch.cat([rest[:first], part, rest[first:]]) for part, rest, first in rows])


class CarriedRun(NamedTuple):
    """A chunk that went on where the one before ended."""

    out: Tensor  # [B, H, T, D]
    carry: TTTCarry  # for the next chunk, detached
    start: TTTState  # fast weights at the first frame of the grid
    state: TTTState  # fast weights after the last frame
    grid: tuple[Tensor, Tensor, Tensor]  # k, v [B, H, G, D] and eta [B, H, G], mini-batches aligned
    frames: Tensor  # [B, T], where the chunk's frames are in the grid


def empty_carry(
    config: TTTConfig,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TTTCarry:
    """The carry of rows that start a recording: fast weights at `W0`, nothing pending."""
    zeros = partial(torch.zeros, device=device, dtype=dtype)
    rows = (batch_size, config.num_heads)
    dims = config.inner_dims(config.head_dim)
    k = zeros(*rows, config.mini_batch_size, config.head_dim)
    return TTTCarry(
        weights=tuple(zeros(*rows, fan_in, fan_out) for fan_in, fan_out in pairwise(dims)),
        biases=tuple(zeros(*rows, 1, fan_out) for fan_out in dims[1:]),
        k=k,
        v=zeros(*rows, config.mini_batch_size, config.head_dim),
        eta=zeros(*rows, config.mini_batch_size),
        heard=no_keys(k, config.key_shift) if config.key_shift else None,
        num_pending=(0,) * batch_size,
    )


def stack_carries(carries: Sequence[TTTCarry]) -> TTTCarry:
    """Rows of several carries as one."""
    weights, biases, k, v, eta, heard, num_pending = zip(*carries, strict=True)
    return TTTCarry(
        tuple(torch.cat(parts) for parts in zip(*weights, strict=True)),
        tuple(torch.cat(parts) for parts in zip(*biases, strict=True)),
        torch.cat(k),
        torch.cat(v),
        torch.cat(eta),
        None if heard[0] is None else HeardKeys(*map(torch.cat, zip(*heard, strict=True))),
        tuple(chain.from_iterable(num_pending)),
    )


def row_of_carry(carry: TTTCarry, row: int) -> TTTCarry:
    """One row as a carry of its own, copied, so that it does not keep the others in memory."""
    part = slice(row, row + 1)
    return TTTCarry(
        tuple(w[part].clone() for w in carry.weights),
        tuple(b[part].clone() for b in carry.biases),
        carry.k[part].clone(),
        carry.v[part].clone(),
        carry.eta[part].clone(),
        None if carry.heard is None else HeardKeys(*(x[part].clone() for x in carry.heard)),
        carry.num_pending[part],
    )


def run_carried(
    inner: InnerLoop,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    carry: TTTCarry,
    *,
    heard: HeardKeys | None = None,
) -> CarriedRun:
    """One pass over a chunk from carried fast weights; the same outputs as one pass over the recording.

    Rows may stand at different places of their mini-batch. Each row's pending and new tokens are laid out
    from the start of a mini-batch, and only mini-batches that are full become part of the carry.

    Args:
        inner: the network and its settings.
        tokens: q, k, v `[B, H, T, D]` and eta `[B, H, T]`.
        carry: of the chunk before; it is not modified.
        heard: what the next carry keeps for the key shift, see `moshi_ttt.inputs.key_shift.shift_keys`.
    """
    size = inner.settings.mini_batch_size
    q, k, v, eta = (x.to(inner.dtype) for x in tokens)
    num_frames = q.shape[2]
    ends = [pending + num_frames for pending in carry.num_pending]
    num_batches = -(-max(ends) // size)
    frames = frames_after(carry.num_pending, num_frames, q.device)
    aligned = not any(carry.num_pending) and num_frames % size == 0
    if not aligned:
        layout = _layout(carry.num_pending, num_frames, size, num_batches * size, q.device)  # [B, G]
        pending = (torch.zeros_like(carry.k), carry.k, carry.v, carry.eta)
        q, k, v, eta = (_to_grid(*pair, layout) for pair in zip(pending, (q, k, v, eta), strict=True))
    start_state = TTTState(
        tuple(w + delta for w, delta in zip(inner.weights, carry.weights, strict=True)),
        tuple(b + delta for b, delta in zip(inner.biases, carry.biases, strict=True)),
        tuple(w.new_zeros(*w.shape[:2], 0, w.shape[2]) for w in carry.weights),
        tuple(w.new_zeros(*w.shape[:2], 0, w.shape[3]) for w in carry.weights),
    )
    outs = []
    kept = seen = state = start_state
    all_full = min(ends) // size
    for start, stop in [(0, all_full), *((n, n + 1) for n in range(all_full, num_batches))]:
        if start == stop:
            continue
        part = slice(start * size, stop * size)
        out, state = inner.run((q[:, :, part], k[:, :, part], v[:, :, part], eta[:, :, part]), state)
        outs.append(out)
        kept = _where([end // size >= stop for end in ends], state, kept)
        seen = _where([-(-end // size) >= stop for end in ends], state, seen)
    out = torch.cat(outs, 2)
    return CarriedRun(
        out=out if aligned else _take(out, frames),
        carry=_next_carry(inner, kept, (k, v, eta), ends, heard),
        start=start_state,
        state=seen,
        grid=(k, v, eta),
        frames=frames,
    )


def per_row(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host, one per row, on a device, which the host does not wait for. `[B, 1]`."""
    on_host = torch.tensor(values)[:, None]
    if device.type == "cuda":
        on_host = on_host.pin_memory()  # from other memory the copy waits for all that was launched before
    return on_host.to(device, non_blocking=True)


def frames_after(num_before: Sequence[int], num_frames: int, device: torch.device) -> Tensor:
    """Numbers of the frames that follow so many others in each row. `[B, T]`."""
    return per_row(num_before, device) + torch.arange(num_frames, device=device)


def _layout(
    num_pending: Sequence[int], num_frames: int, size: int, width: int, device: torch.device
) -> Tensor:
    """Where each grid column's token is in (C pending, T new, one empty). `[B, G]`."""
    column = torch.arange(width, device=device)
    pending = per_row(num_pending, device)
    new = torch.where(column - pending < num_frames, size + column - pending, size + num_frames)
    return torch.where(column < pending, column, new)


def _to_grid(old: Tensor, new: Tensor, layout: Tensor) -> Tensor:
    empty = torch.zeros_like(new[:, :, :1])
    return _take(torch.cat([old.to(new.dtype), new, empty], 2), layout)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Columns of `[B, H, _, ...]` by an index `[B, n]`."""
    index = index[:, None, :, None] if x.dim() == 4 else index[:, None]
    return torch.take_along_dim(x, index, 2)


def _where(rows: Sequence[bool], new: TTTState, old: TTTState) -> TTTState:
    """The new fast weights in some rows, the old ones in the others; nothing pending in either."""
    if all(rows):
        return new
    mask = per_row(rows, new.start_weights[0].device)[:, :, None, None]
    return TTTState(
        tuple(torch.where(mask, n, o) for n, o in zip(new.start_weights, old.start_weights, strict=True)),
        tuple(torch.where(mask, n, o) for n, o in zip(new.start_biases, old.start_biases, strict=True)),
        new.pending_inputs,
        new.pending_gradients,
    )


def _next_carry(
    inner: InnerLoop,
    state: TTTState,
    grid: tuple[Tensor, Tensor, Tensor],
    ends: Sequence[int],
    heard: HeardKeys | None,
) -> TTTCarry:
    size = inner.settings.mini_batch_size
    with torch.no_grad():
        width = grid[0].shape[2]
        rest = frames_after([end // size * size for end in ends], size, grid[0].device).clamp(max=width - 1)
        k, v, eta = (_take(x.detach(), rest) for x in grid)
        return TTTCarry(
            tuple(w.detach() - w0.detach() for w, w0 in zip(state.start_weights, inner.weights, strict=True)),
            tuple(b.detach() - b0.detach() for b, b0 in zip(state.start_biases, inner.biases, strict=True)),
            k,
            v,
            eta,
            None if heard is None else heard._replace(keys=heard.keys.detach()),
            tuple(end % size for end in ends),
        )
