"""A safetensors file written one tensor after the other, so that memory holds one of them."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from finetune.base_model.weight_files import TensorHeader

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ALIGNMENT = 8  # of the first tensor, in bytes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a new file.

    Attributes:
        source: the tensor of the old file that it is made of.
        shape: that it will have.
        dtype: in the spelling of safetensors; the same as the source's.
        make: from the old tensor to the new one; None: as it is.
    """

    source: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[Tensor], Tensor] | None = None

    @property
    def num_values(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


Plan = dict[str, PlannedTensor]


def plan_copy(headers: Mapping[str, TensorHeader]) -> Plan:
    """All tensors of a file as they are."""
    return {name: PlannedTensor(name, header.shape, header.dtype) for name, header in headers.items()}


def write_planned(plan: Mapping[str, PlannedTensor], source: Path, out: Path) -> None:
    """Write the tensors of a plan.

    Args:
        plan: by name.
        source: the file that holds what they are made of.
        out: the file to write.

    Raises:
        OSError: it cannot be written.
    """
    # Wide types first, as safetensors itself orders them: then each tensor begins at a multiple of its width.
    names = sorted(plan, key=lambda name: (-_BYTES[plan[name].dtype], name))
    with safe_open(source, framework="pt") as old, out.open("wb") as file:
        header: dict[str, object] = {"__metadata__": old.metadata()} if old.metadata() else {}
        end = 0
        for name in names:
            begin, end = end, end + _num_bytes(plan[name])
            part = {"dtype": plan[name].dtype, "shape": list(plan[name].shape), "data_offsets": [begin, end]}
            header[name] = part
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = old.get_tensor(plan[name].source)
            made = plan[name].make
            file.write(_data(tensor if made is None else made(tensor), plan[name], name))


def _num_bytes(planned: PlannedTensor) -> int:
    return _BYTES[planned.dtype] * planned.num_values


def _data(tensor: Tensor, planned: PlannedTensor, name: str) -> memoryview:
    assert tuple(tensor.shape) == planned.shape, (name, tuple(tensor.shape), planned.shape)
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    assert data.nbytes == _num_bytes(planned), name
    return data
