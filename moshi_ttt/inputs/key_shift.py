"""Keys from an earlier frame: the memory learns what follows a frame, not what a frame is.

With q, k and v of one frame, an inner step teaches the fast weights that the frame's key means the frame's
value; asked with a frame that was heard before, they give that same frame. With the key of the frame before
they give the frame that came after it. Gated DeltaNet, KDA and Titans have short convolutions for this;
here the shift itself, without parameters, is the mechanism.

A frame's key comes from the frame that its row heard `key_shift` frames earlier. Padding, and steps in
which a row does not execute, are not heard: they are left out of the count.

Shapes: B batch rows, H heads, T frames, D head_dim, s key_shift.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class HeardKeys(NamedTuple):
    """The keys of the frames that each row heard last: predecessors of the frames still to come."""

    keys: Float[Tensor, "B H s D"]  # the newest last
    num_heard: Int[Tensor, " B"]  # of them, from the newest on; fewer where a recording starts


def no_keys(like: Float[Tensor, "B H _ D"], key_shift: int) -> HeardKeys:
    """Of rows that have heard nothing yet, on the device and in the dtype of `like`."""
    batch_size, num_heads, _, head_dim = like.shape
    keys = like.new_zeros(batch_size, num_heads, key_shift, head_dim)
    return HeardKeys(keys, like.new_zeros(batch_size, dtype=torch.long))


def shift_keys(
    k: Float[Tensor, "B H T D"], heard: HeardKeys, is_heard: Bool[Tensor, "B T"] | None
) -> tuple[Float[Tensor, "B H T D"], Bool[Tensor, "B T"], HeardKeys]:
    """Give every frame the key of the frame that its row heard s frames earlier.

    The definition is `moshi_ttt.reference.shift_keys_reference`. Fixed shapes and no branch on values, so
    that a step of a conversation can be captured in a CUDA graph.

    Args:
        k: keys of the frames, at their own places.
        heard: of the frames before; not modified.
        is_heard: False where a frame is padding or its row does not execute; None: all are heard.

    Returns:
        The shifted keys; which of them exist (the others are of no meaning); and what `heard` is after the
        last frame.
    """
    shift, num_frames = heard.keys.shape[2], k.shape[2]
    if num_frames == 1:
        return _shift_one(k, heard, is_heard)
    every = torch.cat((heard.keys.to(k.dtype), k), 2)
    # Of the list (s from before, then what is heard here), frame t needs the entry s before its own.
    if is_heard is None:
        exists = heard.num_heard[:, None] + torch.arange(num_frames, device=k.device) >= shift
        num_heard = (heard.num_heard + num_frames).clamp(max=shift)
        return every[:, :, :num_frames], exists, HeardKeys(every[:, :, num_frames:].clone(), num_heard)
    before = is_heard.cumsum(1) - is_heard.long()  # heard in this pass before each frame
    order = _heard_first(is_heard, shift)
    shifted = _pick(every, before, order)
    exists = heard.num_heard[:, None] + before >= shift
    last = is_heard.sum(1, keepdim=True) + torch.arange(shift, device=k.device)
    num_heard = (heard.num_heard + is_heard.sum(1)).clamp(max=shift)
    return shifted, exists, HeardKeys(_pick(every, last, order), num_heard)


def _shift_one(
    k: Float[Tensor, "B H 1 D"], heard: HeardKeys, is_heard: Bool[Tensor, "B 1"] | None
) -> tuple[Float[Tensor, "B H 1 D"], Bool[Tensor, "B 1"], HeardKeys]:
    """The same for a frame of a conversation; a copy, since the buffers of `heard` are written over then."""
    keys = heard.keys.to(k.dtype)
    after = torch.cat((keys[:, :, 1:], k), 2)
    one: Tensor | int = 1
    if is_heard is not None:
        after = torch.where(is_heard[:, None, :, None], after, keys)
        one = is_heard[:, 0].long()
    exists = heard.num_heard[:, None] >= keys.shape[2]
    return keys[:, :, :1].clone(), exists, HeardKeys(after, (heard.num_heard + one).clamp(max=keys.shape[2]))


def _heard_first(is_heard: Bool[Tensor, "B T"], shift: int) -> Int[Tensor, "B s+T"]:
    """Where the entries of that list are: the carried ones, what is heard in its order, then the rest."""
    order = shift + torch.argsort((~is_heard).long(), dim=1, stable=True)
    carried = torch.arange(shift, device=order.device).expand(len(order), shift)
    return torch.cat((carried, order), 1)


def _pick(
    every: Float[Tensor, "B H n D"], entries: Int[Tensor, "B t"], order: Int[Tensor, "B n"]
) -> Float[Tensor, "B H t D"]:
    """Entries of the list of keys, by their place in it."""
    places = order.gather(1, entries)
    return torch.take_along_dim(every, places[:, None, :, None], 2)
