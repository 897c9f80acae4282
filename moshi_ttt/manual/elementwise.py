"""What happens to each token on its own, beside the matrix products.

The functions run as they stand, with ATen's fused kernels, or through `torch.compile`, which makes one kernel
of each.

Shapes: R rows (batch rows times heads), L tokens of a group, C of a mini-batch, D head_dim, H the width of a
hidden layer; `...` where any leading dimensions will do.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_SLOPE = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


class OutputGradient(NamedTuple):
    """Of the inner loss at the output of the inner MLP."""

    normed: Tensor  # [..., L, D], LayerNorm's value before weight and bias
    mean: Tensor  # [..., L, 1]
    rstd: Tensor  # [..., L, 1]
    raw: Tensor  # [..., L, D], before clipping
    shrink: Tensor | None  # [..., L, 1], what clipping multiplies it by; None without it

    def part(self, tokens: slice) -> "OutputGradient":
        """That of some of the tokens; ATen's LayerNorm takes mean and rstd to be contiguous."""
        normed, mean, rstd, raw = (
            x[:, tokens].contiguous() for x in (self.normed, self.mean, self.rstd, self.raw)
        )
        shrink = None if self.shrink is None else self.shrink[:, tokens].contiguous()
        return OutputGradient(normed, mean, rstd, raw, shrink)


def activate(z: Tensor, x: Tensor) -> None:
    """GELU (tanh form) of z into x, `[..., H]`."""
    torch.ops.aten.gelu.out(z, approximate="tanh", out=x)


def gelu_slope(z: Tensor) -> Tensor:
    """Derivative of GELU, `[..., H]`."""
    return torch.ops.aten.gelu_backward(z.new_ones(()).expand_as(z), z, approximate="tanh")


def output_gradient(
    z: Tensor,
    shift: Tensor,
    square: Tensor,
    eta: Tensor,
    eps: float,
    clip: float | None,
    steps: Tensor,
) -> OutputGradient:
    """`d/dz 0.5 * ||LN(z) - target||^2`, and the step: eta times it, clipped.

    Args:
        z: output of the inner MLP, `[R, L, D]`.
        shift: `ln_weight * (ln_bias - target)`, `[R, L, D]`.
        square: `ln_weight^2`, `[R, 1, D]`.
        eta: `[R, L, 1]`.
        eps: of the LayerNorm.
        clip: largest norm of the gradient; None: any.
        steps: is written, `[R, L, D]`.
    """
    normed, mean, rstd = normalise(z, eps)
    raw = _normalise_backward(torch.addcmul(shift, normed, square), z, mean, rstd)
    if clip is None:
        torch.mul(raw, eta, out=steps)
        return OutputGradient(normed, mean, rstd, raw, None)
    norm = torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp(min=1e-15)
    shrink = (clip / norm).clamp(max=1)
    torch.mul(raw, shrink * eta, out=steps)
    return OutputGradient(normed, mean, rstd, raw, shrink)


def through_output_gradient(
    dsteps: Tensor,
    eta: Tensor,
    z: Tensor,
    saved: OutputGradient,
    v_ln: Tensor,
    r_mean_v_xhat: Tensor,
    weight: Tensor,
    dv_ln: Tensor,
    dz: Tensor,
) -> None:
    """Back through `output_gradient`.

    Args:
        dsteps: gradient of the steps, `[R, C, D]`.
        eta, z, saved: of `output_gradient`.
        v_ln: `shift + square * normed`, `[R, C, D]`.
        r_mean_v_xhat: `rstd * mean(v_ln * normed)`, `[R, C, 1]`.
        weight: of the LayerNorm, `[R, 1, D]`.
        dv_ln: gradient of v_ln, is written, `[R, C, D]`.
        dz: gradient of z, is written, `[R, C, D]`.
    """
    gradient = dsteps * eta
    if saved.shrink is not None:
        along = (gradient * saved.raw).sum(-1, keepdim=True)
        along = along / saved.raw.square().sum(-1, keepdim=True).clamp(min=1e-30)
        straight = gradient * saved.shrink
        clipped = straight.addcmul(saved.raw, along * saved.shrink, value=-1)
        gradient = torch.where(saved.shrink < 1, clipped, straight)
    inner = _normalise_backward(gradient, z, saved.mean, saved.rstd)
    dv_ln.copy_(inner)
    w = inner * (weight * weight)
    w = w.addcmul(gradient, r_mean_v_xhat, value=-1)
    size = (gradient * saved.normed).mean(-1, keepdim=True) * saved.rstd
    w = w.addcmul(v_ln, size, value=-1)
    share = (gradient * saved.raw).mean(-1, keepdim=True) * saved.rstd
    straight = _normalise_backward(w, z, saved.mean, saved.rstd)
    torch.addcmul(straight, saved.normed, share, value=-1, out=dz)


def through_slope(dx: Tensor, slope: Tensor, dsteps: Tensor, u_phi2: Tensor, dz: Tensor) -> None:
    """`dz = dx * slope + dsteps * u_phi2`, all `[R, C, H]`."""
    torch.mul(dx, slope, out=dz)
    dz.addcmul_(dsteps, u_phi2)


def through_gelu(dx: Tensor, z: Tensor, dz: Tensor) -> None:
    """`dz = dx * gelu'(z)`, all `[..., H]`."""
    torch.ops.aten.gelu_backward.grad_input(dx, z, approximate="tanh", grad_input=dz)


def u_phi2(z: Tensor, u: Tensor) -> Tensor:
    """`u * gelu''(z)`, all `[..., H]`.

    That is u (1 - t^2)(2 w' - c - z t w'^2), with t = tanh(w(z)) and w' = c + 3 a c z^2.
    """
    tanh = z * z
    slope = (tanh * (3 * _CUBIC * _SLOPE)).add_(_SLOPE)  # w'
    tanh.mul_(_CUBIC * _SLOPE).add_(_SLOPE).mul_(z).tanh_()
    product = (z * tanh).mul_(slope).sub_(1)
    slope.addcmul_(slope, product, value=-1).sub_(_SLOPE)
    return slope.mul_(tanh.mul_(tanh).neg_().add_(1)).mul_(u)


def through_output_norm(
    dout: Tensor, z: Tensor, weight: Tensor, eps: float, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """Gradient of z through `weight * normalise(z) + bias`, `[R, L, D]`; dweight, dbias are added to."""
    normed, mean, rstd = normalise(z, eps)
    dweight.add_((normed * dout).sum(1, keepdim=True))
    dbias.add_(dout.sum(1, keepdim=True))
    return _normalise_backward(dout * weight, z, mean, rstd)


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(z - mean) / std` over the last dimension, the mean and 1 / std `[..., 1]`."""
    return torch.ops.aten.native_layer_norm(z, z.shape[-1:], None, None, eps)


def _normalise_backward(gradient: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of z, given that of the normalised value: `rstd * (g - mean(g) - x mean(g x))`."""
    return torch.ops.aten.native_layer_norm_backward(
        gradient, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


class Elementwise(NamedTuple):
    """The functions above, eager or compiled."""

    activate: Callable[..., None] = activate
    gelu_slope: Callable[..., Tensor] = gelu_slope
    output_gradient: Callable[..., OutputGradient] = output_gradient
    through_output_gradient: Callable[..., None] = through_output_gradient
    through_slope: Callable[..., None] = through_slope
    through_gelu: Callable[..., None] = through_gelu
    u_phi2: Callable[..., Tensor] = u_phi2
    through_output_norm: Callable[..., Tensor] = through_output_norm


@cache
def elementwise(*, compiled: bool) -> Elementwise:
    """The functions as they stand, or each as one compiled kernel."""
    functions = Elementwise()
    return Elementwise._make(map(torch.compile, functions)) if compiled else functions
