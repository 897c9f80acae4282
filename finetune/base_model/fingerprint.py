"""Whether two base models are the same, without reading all of their weights."""

import hashlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from moshi.models.loaders import CheckpointInfo
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from finetune.base_model.weight_files import read_header
from finetune.errors import CheckpointError

logger = logging.getLogger(__name__)

_OF_ALL = "all-"  # what a fingerprint begins with; those of earlier versions have no such word
_EARLIER = ("transformer.", "condition_provider.")  # the tensors that these looked at
_MAX_ROWS = 16
_MAX_VALUES = 4096  # of a row


def base_fingerprint(info: CheckpointInfo) -> str:
    """A hash of names, shapes and values of every tensor, the same whatever float dtype holds the values.

    Of a large tensor up to 16 rows count, evenly spaced, the first and the last among them: of Moshi 7B
    35 MB of 15 GB are read, in 5,000 places, which takes about a second. Weights that were trained or drawn
    again are noticed, a single changed value inside a large tensor may not be.

    Raises:
        CheckpointError: the file is corrupt.
    """
    return _OF_ALL + _digest(info, lambda name: True, _all_over)


def is_same_base(info: CheckpointInfo, fingerprint: str) -> bool:
    """Whether a base model is the one of a fingerprint; of an earlier version's, says that it compares less.

    Raises:
        CheckpointError: the file is corrupt.
    """
    if fingerprint.startswith(_OF_ALL):
        return base_fingerprint(info) == fingerprint
    same = _digest(info, lambda name: name.startswith(_EARLIER), _at_the_start) == fingerprint
    if same:
        logger.warning(
            "%s: compared with the base model of training by its transformer and conditioners only, as the "
            "version that trained did: embeddings, text head and depth transformer may be others.",
            info.moshi_weights,
        )
    return same


def _digest(
    info: CheckpointInfo, counts: Callable[[str], bool], values: Callable[["_StoredTensor"], Tensor]
) -> str:
    digest = hashlib.sha256()
    for path in (info.moshi_weights, info.lora_weights):
        if path is None:
            continue
        read_header(Path(path))  # what is corrupt or enormous ends here
        try:
            with Path(path).open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
                for name in sorted(name for name in header if name != "__metadata__" and counts(name)):
                    tensor = _StoredTensor(file, 8 + size, header[name])
                    digest.update(f"{name} {tensor.shape}".encode())
                    digest.update(values(tensor).double().numpy().tobytes())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}.") from None
    return digest.hexdigest()[:16]


class _StoredTensor:
    """A tensor of a file of which single rows are read; one without rows (a vector, a number) is a row.

    Through safetensors itself each row is a mapped page, around which the system reads megabytes.
    """

    def __init__(self, file: BinaryIO, data: int, entry: Mapping[str, Any]) -> None:
        self.shape: list[int] = entry["shape"]
        self._file, self._dtype = file, entry["dtype"]
        shape = self.shape if len(self.shape) > 1 else [1, *self.shape]
        self._num_rows, self._row_shape = shape[0], shape[1:]
        begin, end = entry["data_offsets"]
        self._begin, self._row_bytes = data + begin, (end - begin) // max(self._num_rows, 1)

    def rows(self, max_rows: int) -> Tensor:
        """Rows evenly spaced from the first to the last, `[rows, values of a row]`."""
        number = min(self._num_rows, max_rows)
        places = torch.linspace(0, self._num_rows - 1, number, dtype=torch.float64).round()
        content = b""
        for place in places.tolist():
            self._file.seek(self._begin + int(place) * self._row_bytes)
            content += self._file.read(self._row_bytes)
        shape = [number, *self._row_shape]
        entry = {"dtype": self._dtype, "shape": shape, "data_offsets": [0, len(content)]}
        header = json.dumps({"rows": entry}).encode()
        return load(struct.pack("<Q", len(header)) + header + content)["rows"].reshape(
            number, -1 if content else 0
        )


def _all_over(tensor: _StoredTensor) -> Tensor:
    values = tensor.rows(_MAX_ROWS)
    return values[:, :: max(1, -(-values.shape[1] // _MAX_VALUES))].contiguous()


def _at_the_start(tensor: _StoredTensor) -> Tensor:
    return tensor.rows(1).flatten()[: 16 if len(tensor.shape) > 1 else 1]
