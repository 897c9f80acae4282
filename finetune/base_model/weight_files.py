"""Weight files: headers, which are compared with a model before any tensor is read, and tensors."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.errors import CheckpointError
from finetune.ttt_utils import is_ttt_parameter
from moshi_ttt.files.header_size import MAX_HEADER_BYTES, oversized_header

_FLOATS = ("F64", "F32", "F16", "BF16")
_PLACE_HINT = " (is lora.enable, or are ttt.layers, different?)"


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a file says about a tensor.

    Attributes:
        file: name of the file.
        shape: of the tensor.
        dtype: in the spelling of safetensors (`F32`).
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: Path, names: Iterable[str]) -> dict[str, TensorHeader]:
    """The headers of those weight files that exist, by name of the tensor; no tensor is read.

    Raises:
        CheckpointError: a file is corrupt, or two of them hold the same tensor.
    """
    found: dict[str, TensorHeader] = {}
    for file in names:
        if not (folder / file).is_file():
            continue
        for name, header in read_header(folder / file).items():
            if name in found:
                raise CheckpointError(f"{folder}: {found[name].file} and {file} both hold {name}.")
            found[name] = header
    return found


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file, checked against its size; no tensor is read.

    Raises:
        CheckpointError: the file is corrupt: not safetensors, truncated, overlapping or unused bytes.
    """
    try:
        size = oversized_header(path)
        if size is not None:
            raise CheckpointError(
                f"{path}: its header has {size:,} bytes, no model needs more than {MAX_HEADER_BYTES:,}."
            )
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorHeader(path.name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}.") from None


def count_parameters(path: Path) -> int:
    """Number of parameters of a safetensors file, from its header.

    Raises:
        CheckpointError: the file is corrupt.
    """
    return sum(math.prod(header.shape) for header in read_header(path).values())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is corrupt.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}.") from None


def read_files(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of those files that exist; `read_headers` has seen that none is there twice."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        if (folder / name).is_file():
            tensors |= read_tensors(folder / name)
    return tensors


def check_headers(
    headers: Mapping[str, TensorHeader],
    expected: Mapping[str, tuple[int, ...]],
    *,
    complete: Collection[str],
    source: str,
) -> None:
    """Compare names, shapes and dtypes of files with a model that is built, or that descriptions announce.

    Args:
        headers: by name of the tensor.
        expected: shapes of the model's tensors.
        complete: kinds (see `tensor_kind`) of which the model may have no tensor that is not given.
        source: what the line starts with: the folder of the files.

    Raises:
        CheckpointError: names the first tensor that has no place, is missing, or has another shape or dtype.
    """
    placed = {name_in(expected, name): header for name, header in headers.items()}
    unknown = sorted(set(placed) - set(expected))
    if unknown:
        file = placed[unknown[0]].file
        hint = "" if tensor_kind(unknown[0]) == "base" else _PLACE_HINT
        raise CheckpointError(
            f"{source}: {len(unknown)} tensors have no place in this model, for example {unknown[0]} of "
            f"{file}{hint}."
        )
    missing = sorted(name for name in expected if tensor_kind(name) in complete and name not in placed)
    if missing:
        kind = {"ttt": "TTT", "lora": "LoRA", "base": "base"}[tensor_kind(missing[0])]
        raise CheckpointError(
            f"{source}: {len(missing)} {kind} tensors are missing, for example {missing[0]}; "
            "the checkpoint is not complete, or was made for other layers."
        )
    for name, header in placed.items():
        if header.shape != tuple(expected[name]):
            raise CheckpointError(
                f"{source}: {header.file}: {name} has shape {list(header.shape)}, "
                f"expected {list(expected[name])}."
            )
        if header.dtype not in _FLOATS:
            raise CheckpointError(
                f"{source}: {header.file}: {name} has dtype {header.dtype}, expected one of "
                f"{', '.join(_FLOATS)}."
            )


def check_finite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Look for values that no training leaves behind.

    Raises:
        CheckpointError: names the first tensor with NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} holds values that are not finite numbers.")


def check_finite_model(model: nn.Module, *, source: str) -> None:
    """Look at all weights of a model that was loaded; whole numbers are finite.

    Raises:
        CheckpointError: names the first tensor with NaN or infinity.
    """
    floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    check_finite(floats, source=source)


def name_in(state: Collection[str], name: str) -> str:
    """The name of a tensor in a model: a linear layer with an adapter has its own weight in `frozen_W`."""
    frozen = name.removesuffix("weight") + "frozen_W.weight"
    return frozen if name not in state and frozen in state else name


def tensor_kind(name: str) -> str:
    """`ttt` (gates included), `lora`, or `base` for a tensor of the base model."""
    if is_ttt_parameter(name):
        return "ttt"
    return "lora" if ".lora_" in name else "base"
