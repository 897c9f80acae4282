"""Starting the kernels: how many programs, in what precision, on what device.

Shapes: as in `kernels`.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moshi_ttt.fused.layouts import LAYOUTS
from moshi_ttt.fused.support import interpreted, precision


def group_length(mini_batch_size: int) -> int:
    """Tokens of a group."""
    return max(64, mini_batch_size)


def num_slices(shape: tuple[int, int], major: int) -> int:
    """Programs per row; one where they run one after the other and none could wait for another.

    Args:
        shape: head_dim and mini_batch_size.
        major: first number of the GPU's compute capability.
    """
    return 1 if interpreted() else LAYOUTS[major][shape].slices


def compile_options(major: int) -> dict[str, int]:
    """For a GPU of this compute capability, its first number."""
    options = {"num_warps": 8, "num_stages": 1}
    # NVIDIA's assembler 12.8 gives a thread 32 registers on 8.x, and a hundred spills, unless it is told.
    return options | {"maxnreg": 255} if major == 8 else options


def launch(kernel: Any, *tensors: Tensor, sizes: tuple[int, ...], eps: float, shape: dict[str, int]) -> None:
    """Run one kernel over all rows.

    Args:
        kernel: of `kernels`.
        tensors: its arguments up to `dln_bias` or `b1_last`, contiguous, float32; the first is `[R, T, D]`.
        sizes: its integers.
        eps: of the LayerNorm.
        shape: D, F, C and G.
    """
    k = tensors[0]
    num_rows, dim = k.shape[0], k.shape[2]
    major = torch.cuda.get_device_capability(k.device)[0] if k.is_cuda else 0
    slices = num_slices((dim, shape["C"]), major)
    parts = k.new_empty(num_rows, 2, slices, shape["C"], dim)
    counters = torch.zeros(num_rows + 1, dtype=torch.int32, device=k.device)
    with _device(k):
        kernel[(num_rows * slices,)](
            *tensors,
            parts,
            counters[:num_rows],
            counters[num_rows:],
            *sizes,
            eps,
            **shape,
            S=slices,
            PRECISION=precision(),
            **compile_options(major),
        )


def _device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
