"""Where the Triton kernels run, and why not where they do not.

Nothing here imports Triton.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from moshi_ttt.fused.layouts import LAYOUTS

EXPANSION = 4  # hidden width of the inner MLP over head_dim

PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}
"""What products round their operands to, by `torch.get_float32_matmul_precision()`."""


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def precision() -> str:
    """Of the products in the kernels."""
    return PRECISIONS[torch.get_float32_matmul_precision()]


def why_not(tokens: Tensor, dims: Sequence[int], mini_batch_size: int, *, clips: bool) -> str | None:
    """What keeps the kernels from running, None: nothing.

    Args:
        tokens: of the device and dtype in question, real ones.
        dims: widths of the inner MLP, from its input to its output.
        mini_batch_size: of the inner loop.
        clips: whether a token's inner gradient is clipped.
    """
    if clips:
        return "inner_grad_clip is set"
    if torch.promote_types(tokens.dtype, torch.float32) != torch.float32:
        return f"the tokens are {tokens.dtype}, the kernels compute in float32"
    head_dims, sizes = (sorted(set(numbers)) for numbers in zip(*LAYOUTS[9], strict=True))
    if len(dims) != 3 or dims[0] not in head_dims or dims[1] != EXPANSION * dims[0]:
        widths = ", ".join(f"{dim}-{EXPANSION * dim}-{dim}" for dim in head_dims)
        return f"the widths of the inner MLP are {'-'.join(map(str, dims))}, not one of {widths}"
    if mini_batch_size not in sizes:
        return f"mini_batch_size is {mini_batch_size}, not one of {', '.join(map(str, sizes))}"
    return _why_not_on(tokens.device, (dims[0], mini_batch_size))


def _why_not_on(device: torch.device, shape: tuple[int, int]) -> str | None:
    if interpreted():
        return None if find_spec("triton") is not None else "Triton is not installed"
    if device.type != "cuda" or torch.version.hip is not None:
        return "the tokens are not on an NVIDIA GPU"
    if not has_triton():
        return "Triton is not installed or does not know this GPU"
    properties = torch.cuda.get_device_properties(device)
    if properties.major not in LAYOUTS:
        known = " and ".join(f"{major}.x" for major in sorted(LAYOUTS))
        return f"the GPU's compute capability is {properties.major}.{properties.minor}, they know {known}"
    needed = LAYOUTS[properties.major][shape].shared[precision()]
    there = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    if needed > there:
        return f"they need {needed:,} bytes of shared memory per block, the GPU has {there:,}"
    return None
