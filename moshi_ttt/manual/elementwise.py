"""What happens to each token on its own, beside the matrix products.

Each function writes its result where it is told, so that nothing is allocated in the loop.

Shapes: leading dimensions are any, the last one is the width.
"""

import math

import torch
from torch import Tensor

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def gelu(z: Tensor, out: Tensor) -> Tensor:
    """GELU, tanh form."""
    return torch.ops.aten.gelu.out(z, approximate="tanh", out=out)


def gelu_slope(z: Tensor, out: Tensor) -> Tensor:
    """Its derivative."""
    return torch.ops.aten.gelu_backward.grad_input(
        z.new_ones(()).expand_as(z), z, approximate="tanh", grad_input=out
    )


def gelu_curvature(z: Tensor) -> Tensor:
    """Its second derivative `(1 - t^2)(2 w' - c - z t w'^2)`, with t = tanh(w(z)), w' = c + 3 a c z^2."""
    rate = z.new_full((), _SLOPE).addcmul(z, z, value=3 * _CUBIC * _SLOPE)  # w'
    tanh = rate.new_full((), 2 / 3 * _SLOPE).add(rate, alpha=1 / 3).mul_(z).tanh_()
    bend = (rate * rate).mul_(z).mul_(tanh)
    bend = rate.mul_(2).sub_(_SLOPE).sub_(bend)
    return bend.mul_(tanh.mul_(tanh).neg_().add_(1))


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(z - mean) / std` over the last dimension, the mean and 1 / std `[..., 1]`."""
    return torch.ops.aten.native_layer_norm(z, z.shape[-1:], None, None, eps)


def normalise_backward(gradient: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of z, given that of the normalised value: `rstd * (g - mean(g) - x mean(g x))`."""
    return torch.ops.aten.native_layer_norm_backward(
        gradient, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
