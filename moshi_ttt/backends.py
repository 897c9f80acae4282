"""Which implementation runs the inner loop over whole sequences."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._triton import has_triton

from moshi_ttt.fused.support import why_not

Backend = Literal["auto", "autograd", "manual", "compiled", "fused"]
Chosen = Literal["autograd", "manual", "compiled", "fused"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

logger = logging.getLogger(__name__)


def choose_backend(
    backend: Backend,
    tokens: Tensor,
    *,
    dims: Sequence[int] | None = None,
    mini_batch_size: int = 16,
    inner_grad_clip: float | None = None,
    state_decay: float | None = None,
) -> Chosen:
    """What a backend of the configuration means for these tokens.

    `autograd` differentiates the dual form; it alone has second derivatives. `manual` has the backward pass
    by hand. `compiled` is the same with torch.compile for what is done to each token on its own. `fused` has
    the sequential part in Triton kernels. `auto` is `fused` on a GPU that can do it, `compiled` on one where
    a compiler is found, and `manual` elsewhere: on a CPU the eager kernels are as fast.

    Where `fused` cannot be had, a line in the log says why and the next one is taken. A state that decays is
    left to `autograd`: it cannot be run backwards without loss.

    Args:
        backend: of the configuration.
        tokens: of the device and dtype in question; when they are fake (nothing is computed, a step is only
            traced), nothing is compiled.
        dims: widths of the inner MLP, from its input to its output; None: not known, then `fused` is not
            considered.
        mini_batch_size, inner_grad_clip, state_decay: of the inner loop.

    Raises:
        ValueError: no backend has this name, or `compiled` is asked for and there is no compiler.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(BACKENDS)}.")
    if backend == "autograd" or state_decay is not None:
        return "autograd"
    if is_fake(tokens) or tokens.device.type == "meta":
        return "manual"
    device = tokens.device.type
    if dims is not None and (backend == "fused" or (backend == "auto" and device == "cuda")):
        reason = why_not(tokens, dims, mini_batch_size, clips=inner_grad_clip is not None)
        if reason is None:
            return "fused"
        _say_once(f"The TTT operator does without its fused kernels: {reason}.")
    if backend == "auto" or backend == "fused":
        return "compiled" if device == "cuda" and _has_compiler(device) else "manual"
    if backend == "compiled" and not _has_compiler(device):
        raise ValueError(f"backend 'compiled' needs {_NEEDED[device]}, not found here; use 'manual'.")
    return backend


def compiles(chosen: Chosen, tokens: Tensor) -> bool:
    """Whether what is around the operator is to be compiled as well, for tokens on this device.

    Args:
        chosen: by `choose_backend`. Beside `compiled` that is `fused` on a GPU, where a compiler is found.
        tokens: of the device in question.
    """
    return chosen == "compiled" or (chosen == "fused" and tokens.is_cuda and _has_compiler("cuda"))


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through `torch.compile`, the same object each time."""
    return torch.compile(function)


_NEEDED = {"cpu": "a C++ compiler (g++ or clang++)", "cuda": "Triton and a C compiler (gcc or clang)"}


@cache
def _has_compiler(device: str) -> bool:
    """torch.compile makes C++ on a CPU; on a GPU it needs Triton, which needs a C compiler."""
    if device == "cuda":
        names = (os.environ.get("CC", "gcc"), "clang")
        found = has_triton() and any(map(shutil.which, names))
        if not found:
            logger.info("The TTT operator is not compiled: that needs %s.", _NEEDED[device])
        return found
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


@cache
def _say_once(line: str) -> None:
    logger.info(line)
