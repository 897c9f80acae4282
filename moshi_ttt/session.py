"""A whole conversation as a file: going on from it equals never having stopped.

Attention caches, delay buffers, the codec's state, fast weights and random generators, of one `LMGen` and
one Mimi. The file fits the same model, codec, batch size and dtype only; `moshi_ttt.memory` keeps what is
portable.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.modules.streaming import State, StreamingModule
from moshi.modules.transformer import RingKVCache
from moshi.utils.compile import CUDAGraphed
from torch import Tensor, nn

from moshi_ttt.errors import StateError
from moshi_ttt.files.state_file import StateFile, write_state_file
from moshi_ttt.hybrid_model import ttt_layers, ttt_mode
from moshi_ttt.inner_loop import InnerLoop, TTTState
from moshi_ttt.inputs.key_shift import HeardKeys

KIND = "moshi-ttt session 1"

_CONSTANTS = ("batch_size", "key_shift")
_SAMPLED_VALUES = 16  # of each parameter
_NOT_STATE = (CUDAGraphed, ExitStack, InnerLoop, torch.device, type(None))


@dataclass(frozen=True)
class _Slot:
    """One tensor or number of a streaming state, and how to write it."""

    value: Tensor
    write: Callable[[Tensor], Any]


@torch.no_grad()
def save_session(generator: LMGen, mimi: MimiModel, path: str | Path) -> None:
    """Write the state of a conversation, between two frames.

    Args:
        generator, mimi: both inside `streaming()`.
        path: of the safetensors file; an older one is replaced.

    Raises:
        ValueError: one of them is not streaming.
        StateError: the file cannot be written.
    """
    slots = _slots(generator, mimi)
    tensors = {name: slot.value for name, slot in slots.items()} | _random_states(generator)
    write_state_file(path, tensors, kind=KIND, identity=_identity(generator, mimi))


@torch.no_grad()
def load_session(generator: LMGen, mimi: MimiModel, path: str | Path) -> None:
    """Go on where `save_session` stopped, the random generators of this process included.

    Args:
        generator, mimi: both inside `streaming()`, unchanged when the file does not fit.
        path: written by `save_session`.

    Raises:
        ValueError: one of them is not streaming.
        StateError: the file is corrupt, or of another model, batch size, dtype or device; says what differs.
    """
    slots, random_states = _slots(generator, mimi), _random_states(generator)
    file = StateFile(path, kind=KIND)
    for key, ours in _identity(generator, mimi).items():
        if file.identity.get(key) != ours:
            raise StateError(f"{file.path}: {key} is {file.identity.get(key)}, here it is {ours}.")
    expected = {name: slot.value for name, slot in slots.items()} | random_states
    file.check_shapes({name: tuple(tensor.shape) for name, tensor in expected.items()})
    values = file.read()
    for name, value in values.items():
        if value.dtype != expected[name].dtype:
            raise StateError(f"{file.path}: {name} has dtype {value.dtype}, not {expected[name].dtype}.")
    _check_values(file, values, generator)
    for name, slot in slots.items():
        slot.write(values[name])
    torch.set_rng_state(values["random.cpu"])
    if "random.cuda" in values:
        torch.cuda.set_rng_state(values["random.cuda"], generator.lm_model.device)


def _identity(generator: LMGen, mimi: MimiModel) -> dict[str, Any]:
    model = generator.lm_model
    assert generator._streaming_state is not None
    return {
        "batch size": generator._streaming_state.batch_size,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "TTT layers": sorted(ttt_layers(model)),
        "TTT mode": ttt_mode(model),
        "guidance": generator.cfg_coef != 1.0,
        "fingerprint of the model": fingerprint(model),
        "fingerprint of the codec": fingerprint(mimi),
    }


def fingerprint(module: nn.Module) -> str:
    """A hash of the names, shapes and first values of all parameters: cheap, and telling models apart."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        sample = parameter.detach().flatten()[:_SAMPLED_VALUES]
        digest.update(sample.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def copy_stream(model: LMModel) -> dict[str, Tensor]:
    """A copy of everything in a streaming model that changes with the stream, for `restore_stream`.

    Raises:
        ValueError: the model is not streaming.
    """
    return {name: slot.value.clone() for name, slot in _module_slots("model", model).items()}


@torch.no_grad()
def restore_stream(model: LMModel, copied: dict[str, Tensor]) -> None:
    """Go on where `copy_stream` was called, as often as wanted.

    Args:
        model: inside the same `streaming()`.
        copied: by `copy_stream`, which stays as it is.
    """
    for name, slot in _module_slots("model", model).items():
        slot.write(copied[name])


def _slots(generator: LMGen, mimi: MimiModel) -> dict[str, _Slot]:
    return (
        _module_slots("generator", generator)
        | _module_slots("model", generator.lm_model)
        | _module_slots("codec", mimi)
    )


def _module_slots(prefix: str, module: StreamingModule) -> dict[str, _Slot]:
    if not module.is_streaming:
        raise ValueError(f"The {prefix} is not streaming; a session exists inside `streaming()` only.")
    return {
        ".".join(filter(None, (prefix, name, part))): slot
        for name, state in module.get_streaming_state().items()
        for part, slot in _state_slots(state)
    }


def _state_slots(state: State) -> Iterator[tuple[str, _Slot]]:
    """Everything in a module's streaming state that changes with the stream."""
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            yield name, _Slot(value, value.copy_)
        elif isinstance(value, RingKVCache):
            for part in ("cache", "end_offset"):
                tensor = getattr(value, part)
                yield f"{name}.{part}", _Slot(tensor, tensor.copy_)
        elif isinstance(value, TTTState):
            for part, tensors in value._asdict().items():
                for number, tensor in enumerate(tensors):
                    yield f"{name}.{part}.{number}", _Slot(tensor, tensor.copy_)
        elif isinstance(value, HeardKeys):
            for part, tensor in value._asdict().items():
                yield f"{name}.{part}", _Slot(tensor, tensor.copy_)
        elif isinstance(value, int) and name not in _CONSTANTS:
            yield name, _Slot(torch.tensor(value), _number_writer(state, name))
        else:
            # Anything else that Moshi may keep one day must not be left out of a session unnoticed.
            assert name in _CONSTANTS or isinstance(value, _NOT_STATE) or callable(value), (name, type(value))


def _number_writer(state: State, name: str) -> Callable[[Tensor], None]:
    return lambda value: setattr(state, name, int(value))


def _random_states(generator: LMGen) -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    device = generator.lm_model.device
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states


def _check_values(file: StateFile, values: dict[str, Tensor], generator: LMGen) -> None:
    """Tokens and offsets are used as indices: out of range they would read somewhere else."""
    model: LMModel = generator.lm_model
    for name, value in values.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise StateError(f"{file.path}: {name} holds values that are not finite numbers.")
    for name, value in values.items():
        if value.dtype != torch.long or name in ("generator.cache", "generator.initial"):
            continue
        if (value < 0).any() or (value > 2**48).any():
            raise StateError(f"{file.path}: {name} is negative or too large.")
    for name, value in values.items():
        if name.endswith("exec_mask") and not value.all():
            raise StateError(f"{file.path}: {name} is not set, a session ends between two frames.")
    try:
        torch.Generator().set_state(values["random.cpu"])
    except RuntimeError:
        raise StateError(f"{file.path}: random.cpu is not the state of a random generator.") from None
    for name in ("generator.cache", "generator.initial"):
        tokens = values[name]
        highest = torch.full((tokens.shape[1], 1), model.card)
        highest[0] = model.text_card
        is_token = (tokens >= 0) & (tokens <= highest)
        if not (is_token | (tokens == model.ungenerated_token_id)).all():
            raise StateError(f"{file.path}: {name} holds tokens that this model does not have.")
    for name, offsets in values.items():
        if name.endswith("ttt.offsets"):
            size = ttt_layers(model)[int(name.split(".")[-3])].config.mini_batch_size
            if (offsets >= size).any():
                raise StateError(f"{file.path}: {name} is out of range.")
