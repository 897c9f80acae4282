"""Rotary positions inside an inner mini-batch.

Shapes: B batch rows (or 1), H heads, T tokens, D head_dim.
"""

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, *, theta: float) -> Tensor:
    """Rotate pairs of channels by `position * theta^(-2i/D)` (Su et al. 2021), the norm is kept.

    The angles are computed in float32 whatever the dtype of x: bfloat16 has no room for them.

    Args:
        x: `[B, H, T, D]`, D even.
        positions: integers, `[B, T]` or `[1, T]`.
        theta: base of the frequencies.

    Returns:
        `[B, H, T, D]` in the dtype of x.
    """
    head_dim = x.shape[-1]
    exponents = torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, :, None].float() * theta**-exponents  # [B, 1, T, D/2]
    cos, sin = angles.cos(), angles.sin()
    real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((real * cos - imag * sin, real * sin + imag * cos), -1)
    return rotated.flatten(-2).to(x.dtype)
