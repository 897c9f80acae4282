"""What happens to each token on its own, beside the matrix products.

The functions write into the buffers that they are given, so that nothing is allocated in the loop. They run
as they stand, with ATen's fused kernels, or through `torch.compile`, which makes one kernel of each.

Shapes: R rows (batch rows times heads), C mini_batch_size, D head_dim, H the width of a hidden layer; `...`
where any leading dimensions will do.
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

    normed: Tensor  # [..., C, D], LayerNorm's value before weight and bias
    mean: Tensor  # [..., C, 1]
    rstd: Tensor  # [..., C, 1]
    raw: Tensor  # [..., C, D], before clipping
    shrink: Tensor  # [..., C, 1], what clipping multiplies it by


def activate(z: Tensor, x: Tensor, slope: Tensor) -> None:
    """GELU (tanh form) of z into x and its derivative into slope, `[..., H]`."""
    _gelu_slope(z, slope)
    torch.ops.aten.gelu.out(z, approximate="tanh", out=x)


def output_gradient(
    z: Tensor,
    shift: Tensor,
    square: Tensor,
    eta: Tensor,
    eps: float,
    clip: float | None,
    out: OutputGradient,
    steps: Tensor,
) -> None:
    """`d/dz 0.5 * ||LN(z) - target||^2`, and the step: eta times it, clipped.

    Args:
        z: output of the inner MLP, `[R, C, D]`.
        shift: `ln_weight * (ln_bias - target)`, `[R, C, D]`.
        square: `ln_weight^2`, `[R, 1, D]`.
        eta: `[R, C, 1]`.
        eps: of the LayerNorm.
        clip: largest norm of the gradient; None: any.
        out: is written.
        steps: is written, `[R, C, D]`.
    """
    normed, mean, rstd = normalise(z, eps)
    raw = _normalise_backward(torch.addcmul(shift, normed, square), z, mean, rstd)
    out.normed.copy_(normed)
    out.mean.copy_(mean)
    out.rstd.copy_(rstd)
    out.raw.copy_(raw)
    if clip is None:
        torch.mul(raw, eta, out=steps)
        return
    norm = torch.linalg.vector_norm(raw, dim=-1, keepdim=True).clamp(min=1e-15)
    shrink = (clip / norm).clamp(max=1)
    out.shrink.copy_(shrink)
    torch.mul(raw, shrink * eta, out=steps)


def through_output_gradient(
    dsteps: Tensor,
    eta: Tensor,
    z: Tensor,
    saved: OutputGradient,
    v_ln: Tensor,
    r_mean_v_xhat: Tensor,
    weight: Tensor,
    clip: float | None,
    dv_ln: Tensor,
    dz: Tensor,
) -> None:
    """Back through `output_gradient`.

    Args:
        dsteps: gradient of the steps, `[R, C, D]`.
        eta, z, saved, clip: of `output_gradient`.
        v_ln: `shift + square * normed`, `[R, C, D]`.
        r_mean_v_xhat: `rstd * mean(v_ln * normed)`, `[R, C, 1]`.
        weight: of the LayerNorm, `[R, 1, D]`.
        dv_ln: gradient of v_ln, is written, `[R, C, D]`.
        dz: gradient of z, is written, `[R, C, D]`.
    """
    gradient = dsteps * eta
    if clip is not None:
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


def u_phi2(z: Tensor, u: Tensor, work: tuple[Tensor, Tensor], out: Tensor) -> None:
    """`u * gelu''(z)` into out; both of work are written too. All `[..., H]`.

    That is u (1 - t^2)(2 w' - c - z t w'^2), with t = tanh(w(z)) and w' = c + 3 a c z^2.
    """
    tanh, product = work
    torch.mul(z, z, out=tanh)
    torch.mul(tanh, 3 * _CUBIC * _SLOPE, out=out).add_(_SLOPE)  # w'
    tanh.mul_(_CUBIC * _SLOPE).add_(_SLOPE).mul_(z).tanh_()
    torch.mul(z, tanh, out=product).mul_(out).sub_(1)
    out.addcmul_(out, product, value=-1).sub_(_SLOPE)
    out.mul_(tanh.mul_(tanh).neg_().add_(1)).mul_(u)


def through_output_norm(
    dout: Tensor, z: Tensor, weight: Tensor, eps: float, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Back through `q + weight * normalise(z) + bias`: dz `[..., C, D]` is written.

    Returns:
        normalise(z) times dout, and dout, summed over groups and tokens, `[R, 1, D]`.
    """
    normed, mean, rstd = normalise(z, eps)
    dz.copy_(_normalise_backward(dout * weight, z, mean, rstd))
    return (normed * dout).sum((0, 2))[:, None], dout.sum((0, 2))[:, None]


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(z - mean) / std` over the last dimension, the mean and 1 / std `[..., 1]`."""
    return torch.ops.aten.native_layer_norm(z, z.shape[-1:], None, None, eps)


def _normalise_backward(gradient: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of z, given that of the normalised value: `rstd * (g - mean(g) - x mean(g x))`."""
    return torch.ops.aten.native_layer_norm_backward(
        gradient, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def _gelu_slope(z: Tensor, slope: Tensor) -> None:
    one = z.new_ones(()).expand_as(z)
    torch.ops.aten.gelu_backward.grad_input(one, z, approximate="tanh", grad_input=slope)


class Elementwise(NamedTuple):
    """The functions above, eager or compiled."""

    activate: Callable[..., None] = activate
    output_gradient: Callable[..., None] = output_gradient
    through_output_gradient: Callable[..., None] = through_output_gradient
    through_slope: Callable[..., None] = through_slope
    through_gelu: Callable[..., None] = through_gelu
    u_phi2: Callable[..., None] = u_phi2
    through_output_norm: Callable[..., tuple[Tensor, Tensor]] = through_output_norm


@cache
def elementwise(*, compiled: bool) -> Elementwise:
    """The functions as they stand, or each as one compiled kernel."""
    functions = Elementwise()
    return Elementwise._make(map(torch.compile, functions)) if compiled else functions
