"""What a run needs to go on as if nothing had happened, as tensors in torch.distributed.checkpoint's format.

Saved are shards: every process writes what it holds, and any other number of processes can read it.
Names: `model.<parameter>` (of those that train, and of frozen ones that a warm start changed),
`optimizer.<parameter>.<moment>`, `memory.<lane>.<layer>.<part>`,
`gate.<layer>` (the gates at the start of the run), `random.<rank>.<generator>`.

The format keeps its index as a pickle, and a pickle can name any function to be called. Here only the classes
that such an index consists of are found; tensors are read by `torch.load` with `weights_only`.
"""

import pickle
import random
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from moshi.models.lm import LMModel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.optim import Optimizer

from finetune.distributed import gather_objects, get_rank
from finetune.errors import CheckpointError, one_line
from finetune.sharding import local_part

# What torch.distributed.checkpoint raises; CheckpointException is no Exception.
STATE_ERRORS = (OSError, RuntimeError, ValueError, dcp.CheckpointException)
# What it raises besides when the files are not what it wrote.
_READ_ERRORS = (
    *STATE_ERRORS,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    pickle.UnpicklingError,
)
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
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


def collect_state(
    model: LMModel, optimizer: Optimizer, others: dict[str, Tensor], *, frozen: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of this process; they are those in use, not copies.

    Args:
        model, optimizer: in training.
        others: of the names `memory.…` and `gate.…`.
        frozen: parameters that do not train and are not those of the base model.
    """
    tensors = dict(others)
    for name, parameter in _own(model, frozen).items():
        tensors[f"model.{name}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{moment}"] = value
    rank = get_rank()
    return tensors | {f"random.{rank}.{name}": value for name, value in _random_state().items()}


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def save_state(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the tensors of all processes; every process must call it.

    Args:
        tensors: of this process.
        folder: to make; it must not hold anything.
        group: of all processes, None without torchrun.

    Raises:
        STATE_ERRORS: it cannot be written, in every process alike.
    """
    writer = dcp.FileSystemWriter(folder, overwrite=False, sync_files=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, which is meant
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def load_state(
    folder: Path,
    model: LMModel,
    optimizer: Optimizer,
    others: dict[str, Tensor],
    *,
    frozen: Collection[str] = (),
    source: str,
) -> None:
    """Copy a saved state into a model, its optimiser and other tensors, in place; every process must call it.

    Args:
        folder: with the state.
        model, optimizer: freshly built from the configuration.
        others: tensors by name to be filled, see `collect_state`.
        frozen: as in `collect_state`, when the state was saved.
        source: for messages.

    Raises:
        CheckpointError: the state does not fit the model, or cannot be read.
    """
    reader = StateReader(folder)
    try:
        saved = reader.read_metadata().state_dict_metadata
        own = _own(model, frozen)
        _check_names(saved, own, others, source)
        targets = dict(others)
        for name, parameter in own.items():
            targets[f"model.{name}"] = parameter.detach()
            moments = _empty_moments(saved, name, parameter)
            if moments:
                optimizer.state[parameter] = moments
            targets |= {f"optimizer.{name}.{moment}": value for moment, value in moments.items()}
        generators = _random_state()
        mine = f"random.{get_rank()}."
        targets |= {mine + name: value for name, value in generators.items() if mine + name in saved}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in save_state
            dcp.load(targets, storage_reader=reader, no_dist=not dist.is_initialized())
    except _READ_ERRORS as error:
        raise CheckpointError(f"{source}: the training state cannot be read: {_first_line(error)}") from None
    _check_finite(targets, source)
    if all(mine + name in saved for name in generators):
        _set_random_state(generators)


def _own(model: LMModel, frozen: Collection[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters that make the model another one than its base."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in frozen
    }


def _check_names(
    saved: Mapping[str, object],
    parameters: Mapping[str, torch.nn.Parameter],
    others: Collection[str],
    source: str,
) -> None:
    own = {f"model.{name}": parameter for name, parameter in parameters.items()}
    of_model = {name for name in saved if name.startswith("model.")}
    for name in sorted(of_model ^ own.keys()):
        where = "is not in the checkpoint" if name in own else "has no place in this model"
        raise CheckpointError(f"{source}: {name.removeprefix('model.')} {where}; was another model trained?")
    for name, parameter in own.items():
        entry = saved[name]
        if not isinstance(entry, TensorStorageMetadata) or entry.size != parameter.shape:
            raise CheckpointError(f"{source}: {name.removeprefix('model.')} has another shape.")
    missing = sorted(set(others) - set(saved))
    if missing:
        raise CheckpointError(f"{source}: {missing[0]} is missing in the training state.")


def _check_finite(loaded: Mapping[str, Tensor], source: str) -> None:
    """See, in all processes alike, that what was loaded can be trained on."""
    bad = None
    for name, tensor in loaded.items():
        if not name.startswith("random.") and not local_part(tensor).isfinite().all():
            bad = bad or name
    found = next((name for name in gather_objects(bad) if name is not None), None)
    if found is not None:
        raise CheckpointError(f"{source}: {found} holds values that are not finite numbers.")


def _empty_moments(saved: dict, name: str, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    prefix = f"optimizer.{name}."
    moments: dict[str, Tensor] = {}
    for key in saved:
        if key.startswith(prefix):
            scalar = saved[key].size == torch.Size()
            moments[key.removeprefix(prefix)] = (
                torch.zeros((), dtype=saved[key].properties.dtype, device=parameter.device)
                if scalar
                else torch.zeros_like(parameter)
            )
    if moments and moments.keys() != _MOMENTS:
        missing = ", ".join(sorted(_MOMENTS ^ moments.keys()))
        raise ValueError(f"of the optimiser, {name} has other moments than AdamW ({missing})")
    return moments


def _random_state() -> dict[str, Tensor]:
    """The states of all random generators, as tensors."""
    legacy = np.random.get_state()
    assert isinstance(legacy, tuple)  # a dict only when asked for
    _, keys, position, has_gauss, gauss = legacy
    version, internal, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *internal]),
        "python_gauss": torch.tensor(float("nan") if gauss_next is None else gauss_next, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy_gauss"].item())
    )
    version, *internal = states["python"].tolist()
    gauss = states["python_gauss"].item()
    random.setstate((version, tuple(internal), None if gauss != gauss else gauss))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _first_line(error: BaseException) -> str:
    """What failed, without the tracebacks that torch.distributed.checkpoint puts into its message."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {one_line(error, limit=300)}"


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
            except _READ_ERRORS as error:  # a pickle's bytes may do anything that Python's types refuse
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
