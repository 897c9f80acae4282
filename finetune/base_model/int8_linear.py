"""Frozen linear layers of the base model in int8, half of the bytes of bfloat16: `quantise: int8`.

Weights are rounded row by row, as bitsandbytes does it for LLM.int8() (Dettmers et al. 2022) and Moshi's own
`QLinear`: `W[i] = scale[i] / 127 * Q[i]`, with `scale[i]` the largest |W[i]|. Inputs are not rounded. So the
layer computes the same on a CPU and on a GPU, and its gradient is that of what it computes.

Shapes: I inputs, O outputs, `...` any dimensions before them.
"""

import importlib.util
import logging
from collections.abc import Iterator

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from finetune.errors import ConfigError

SCALE = "weight_scb"  # as in Moshi's QLinear
_LARGEST = 127
# Output layers and what conditions a model are small beside the rest, and rounding them costs most.
_KEPT = ("text_linear", "linears", "extra_heads", "condition_provider", "fuser")
_KEPT_PARTS = ("cross_attention",)  # Moshi's code slices these weights


class Int8Linear(nn.Module):
    """A linear layer without bias that does not train.

    Args:
        weight: int8 `[O, I]`.
        scale: float32 `[O]`.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scb = nn.Parameter(scale, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Round a layer's weight; on the meta device only the shapes count."""
        weight = linear.weight.detach()
        if weight.is_meta:
            return cls(torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight)).float())
        # On the host: the library's own code for GPUs takes float16 only.
        rounded, scale, _ = _int8_vectorwise_quant(weight.float().cpu())
        return cls(rounded.to(weight.device), scale.to(weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T` of `[..., I]` in the dtype of the computation, `[..., O]`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _Int8Product.apply(x, self.weight, self.weight_scb)
        assert isinstance(out, Tensor)
        return out

    def extra_repr(self) -> str:
        """Sizes, as torch prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Int8Product(torch.autograd.Function):
    """`x W^T`, which keeps the rounded weight for its backward pass, and neither x nor a weight of floats.

    Whole numbers up to 127 are exact in every float dtype; scales are applied in float32, to what comes out.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return (F.linear(x, weight.to(x.dtype)) * (scale / _LARGEST)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad * (scale / _LARGEST)).to(grad.dtype) @ weight.to(grad.dtype), None, None


def quantise_base(model: LMModel) -> None:
    """Round the frozen linear layers of a prepared model, in place.

    Adapters and TTT layers train and stay; so do embeddings, output layers, conditioners and cross-attention.

    Args:
        model: of `finetune.wrapped_model.prepare_model`.
    """
    for parent, name, linear in list(_frozen_linears(model)):
        setattr(parent, name, Int8Linear.from_linear(linear))


def quantised_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Rounded weights and their scales, which are no numbers to be cast."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def check_bitsandbytes() -> None:
    """See that what rounds weights is installed, before anything is loaded.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("quantise: int8 needs bitsandbytes; pip install 'moshi-ttt[int8]'.")


def _frozen_linears(model: LMModel) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each layer to be rounded, as an attribute of its parent."""
    for path, parent in model.named_modules():
        words = path.split(".")
        if words[0] in _KEPT or any(part in words for part in _KEPT_PARTS):
            continue
        for name, child in parent.named_children():
            if not isinstance(child, nn.Linear) or child.bias is not None or name in _KEPT:
                continue
            if not child.weight.requires_grad:
                yield parent, name, child


def _int8_vectorwise_quant(weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of bitsandbytes, which is slow to import and warns of kernels that nothing here uses."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.functional import int8_vectorwise_quant

    return int8_vectorwise_quant(weight)
