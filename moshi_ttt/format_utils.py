"""Between Moshi's `[B, T, dim]` and the mini-batch grid `[B, H, N, C, D]` of TTT.

B batch rows, T frames, H heads, N mini-batches, C mini_batch_size, D head_dim; dim = H * D.
The grid is a utility for inspection and kernels: the operators in `moshi_ttt.ops` take `[B, H, T, D]`,
since a grid cannot start in the middle of a mini-batch.
"""

from typing import TypedDict

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moshi_ttt.config import TTTConfig


class FormatInfo(TypedDict):
    """Lengths in frames before and after padding to whole mini-batches."""

    original_length: int
    padded_length: int


def split_heads(x: Float[Tensor, "B T dim"], num_heads: int) -> Float[Tensor, "B H T D"]:
    """`[B, T, dim]` to `[B, H, T, D]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T dim"]:
    """`[B, H, T, D]` to `[B, T, dim]`."""
    return x.transpose(1, 2).flatten(2)


def moshi_to_ttt_format(
    x: Float[Tensor, "B T dim"], config: TTTConfig
) -> tuple[Float[Tensor, "B H N C D"], FormatInfo]:
    """Cut `[B, T, dim]` into heads and mini-batches, the last one padded with zeros.

    Returns:
        `[B, H, N, C, D]` and the lengths that `ttt_to_moshi_format` needs.

    Raises:
        ValueError: x is not three-dimensional or its width is not `config.model_dim`.
    """
    if x.dim() != 3 or x.shape[-1] != config.model_dim:
        raise ValueError(f"Expected [B, T, {config.model_dim}], got {list(x.shape)}.")
    length = x.shape[1]
    padding = -length % config.mini_batch_size
    x = split_heads(F.pad(x, (0, 0, 0, padding)), config.num_heads)
    grid = x.unflatten(2, (-1, config.mini_batch_size))  # [B, H, N, C, D]
    return grid, {"original_length": length, "padded_length": length + padding}


def ttt_to_moshi_format(x: Float[Tensor, "B H N C D"], original_length: int) -> Float[Tensor, "B T dim"]:
    """Inverse of `moshi_to_ttt_format`: `[B, H, N, C, D]` to `[B, original_length, dim]`.

    Raises:
        ValueError: x is not five-dimensional or holds fewer than `original_length` frames.
    """
    if x.dim() != 5 or x.shape[2] * x.shape[3] < original_length:
        raise ValueError(
            f"Expected [B, H, N, C, D] with at least {original_length} frames, got {list(x.shape)}."
        )
    return merge_heads(x.flatten(2, 3))[:, :original_length]
