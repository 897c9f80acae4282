"""Reading the index of a training state without running what it may contain.

`torch.distributed.checkpoint` keeps its index as a pickle, and a pickle can name any function to be called.
Here only the classes that such an index consists of are found; tensors are read by `torch.load` with
`weights_only`.
"""

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


class StateReader(FileSystemReader):
    """Reads what `FileSystemWriter` has written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the state.

        Raises:
            ValueError: it is damaged, or names something that does not belong into an index.
        """
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as stream:
            try:
                metadata = _Unpickler(stream).load()
            except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError) as error:
                raise ValueError(f"the index is damaged: {error}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"the index is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)
