"""Moshi's self-attention, streaming in chunks of any length; its window is set in `finetune.ttt_integration`.

Moshi keeps the keys and values of a stream in a ring of `context` entries and writes a chunk into it before
it reads. That is right for single frames; a longer chunk overwrites entries that its own first frames still
need, once the ring is full. Here a chunk reads the ring as it was and its own frames, and is written after.

Shapes: B batch rows, H heads of keys and values, T frames of the chunk, R entries of the ring, D head_dim.
"""

import torch
from moshi.modules.transformer import KVCacheResult, RingKVCache, StreamingMultiheadAttention
from torch import Tensor


class ChunkedAttention(StreamingMultiheadAttention):
    """`StreamingMultiheadAttention` whose chunks are exact beyond the attention window.

    Made from an existing module by `from_attention`; parameters, names and single frames are Moshi's own.
    """

    @classmethod
    def from_attention(cls, attention: StreamingMultiheadAttention) -> "ChunkedAttention":
        """Turn a module into this class, in place."""
        assert type(attention) is StreamingMultiheadAttention, type(attention).__name__
        attention.__class__ = cls
        assert isinstance(attention, cls)
        return attention

    def _complete_kv(self, k: Tensor, v: Tensor) -> KVCacheResult:
        state = self._streaming_state
        if state is None or k.shape[2] == 1:
            return super()._complete_kv(k, v)
        assert state.kv_cache is not None
        return complete_chunk(state.kv_cache, k, v, state.exec_mask)


def complete_chunk(ring: RingKVCache, k: Tensor, v: Tensor, exec_mask: Tensor) -> KVCacheResult:
    """Keys and values that a chunk may attend to, and the ring advanced past it.

    Args:
        ring: updated in place, in the rows of `exec_mask` only.
        k, v: of the chunk, `[B, H, T, D]`, any T.
        exec_mask: `[B]`.

    Returns:
        Keys and values `[B, H, R + T, D]` and their positions `[B, R + T]`, -1 where the ring is empty.
    """
    num_frames, capacity = k.shape[2], ring.capacity
    end = ring.end_offset[:, None]  # [B, 1], the position of the chunk's first frame
    entries = torch.arange(capacity, device=end.device)
    # Entry r holds the last position before the chunk that is r modulo the capacity.
    positions = end - 1 - (end - 1 - entries) % capacity
    positions = torch.where(positions < 0, -1, positions)
    frames = torch.arange(num_frames, device=end.device)
    result = KVCacheResult(
        torch.cat([ring.cache[0], k], 2),
        torch.cat([ring.cache[1], v], 2),
        torch.cat([positions, end + frames], 1),
    )
    kept = frames[-capacity:]  # no entry is written twice
    index = ((end + kept) % capacity)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    rows = exec_mask.view(-1, 1, 1, 1)
    for cache, new in zip(ring.cache, (k, v), strict=True):
        cache.scatter_(2, index, torch.where(rows, new[:, :, -capacity:], cache.gather(2, index)))
    ring.end_offset.copy_(torch.where(exec_mask, ring.end_offset + num_frames, ring.end_offset))
    return result
