"""Streaming states as safetensors files: written whole or not at all, checked before anything is read."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshi_ttt.errors import StateError
from moshi_ttt.files.atomic_file import replacing
from moshi_ttt.files.header_size import oversized_header


def check_writable(path: str | Path, *, kind: str | None = None) -> None:
    """See whether a file could be written later, without touching it.

    Args:
        path: of the file.
        kind: what an existing file must be in order to be replaced; None: anything.

    Raises:
        StateError: it could not, or an existing file is something else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise StateError(f"{path}: is a folder.")
        exists = path.exists()
        with tempfile.NamedTemporaryFile(prefix=".moshi-ttt-", dir=Path(os.path.realpath(path)).parent):
            pass
    except OSError as error:
        raise StateError(f"{path}: cannot be written: {error.strerror}.") from None
    if exists and kind is not None:
        try:
            StateFile(path, kind=kind)
        except StateError:
            raise StateError(f"{path}: exists and is not {kind}; choose another name.") from None


def write_state_file(
    path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, identity: Mapping[str, Any]
) -> None:
    """Write tensors and what identifies them, whole or not at all.

    Args:
        path: of the file; an older one of the same kind is replaced.
        tensors: by name, on any device.
        kind: what the file is, with a version (`moshi-ttt memory 1`).
        identity: a JSON object.

    Raises:
        StateError: it cannot be written, or another file is in its place, which stays intact.
    """
    path = Path(path)
    check_writable(path, kind=kind)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(on_cpu, partial, {"kind": kind, "identity": json.dumps(identity)})
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}.") from None


class StateFile:
    """A state file whose header has been read; tensors are read on request.

    Args:
        path: of the file.
        kind: what it must be.

    Attributes:
        identity: the JSON object it was written with.
        shapes: of its tensors, by name.

    Raises:
        StateError: the file is missing, corrupt or of another kind.
    """

    def __init__(self, path: str | Path, *, kind: str) -> None:
        self.path = Path(path)
        if not os.path.exists(self.path):
            raise StateError(f"{self.path}: does not exist.")
        if not os.path.isfile(self.path):
            raise StateError(f"{self.path}: is not a file.")
        try:
            header_bytes = oversized_header(self.path)
            if header_bytes is not None:
                raise StateError(f"{self.path}: its header has {header_bytes:,} bytes, that is no {kind}.")
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.path}: cannot be read as safetensors: {error}.") from None
        if metadata.get("kind") != kind:
            raise StateError(
                f"{self.path}: is {metadata.get('kind', 'another safetensors file')}, not {kind}."
            )
        try:
            self.identity = dict(json.loads(metadata["identity"]))
        except (KeyError, TypeError, ValueError, RecursionError):
            raise StateError(f"{self.path}: what identifies its model is damaged.") from None

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes before anything is read.

        Raises:
            StateError: names the first tensor that is missing, unknown or of another shape.
        """
        for name in sorted(expected.keys() | self.shapes.keys()):
            if name not in self.shapes:
                raise StateError(f"{self.path}: has no tensor {name}, which this model needs.")
            if name not in expected:
                raise StateError(f"{self.path}: {name} has no place in this model.")
            if self.shapes[name] != tuple(expected[name]):
                found, wanted = list(self.shapes[name]), list(expected[name])
                raise StateError(f"{self.path}: {name} has shape {found}, this model needs {wanted}.")

    def read(self) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Raises:
            StateError: the file is corrupt.
        """
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in self.shapes}
        except (SafetensorError, OSError) as error:
            raise StateError(f"{self.path}: cannot be read as safetensors: {error}.") from None
