"""The memory of a conversation as a file: the fast weights of every TTT layer, row by row.

Attention caches are not part of it: a memory goes on in another conversation of the same model, on another
device or in another dtype. `moshi_ttt.session` keeps everything.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMGen, LMModel
from torch import Tensor

from moshi_ttt.config import BEFORE_THERE_WERE_KEYS
from moshi_ttt.errors import StateError
from moshi_ttt.files.state_file import StateFile, write_state_file
from moshi_ttt.hybrid_model import streaming_states, ttt_layers
from moshi_ttt.streaming import TTTStreamingState
from moshi_ttt.ttt_layer import TTTLayer

KIND = "moshi-ttt memory 1"


@dataclass(frozen=True)
class MemoryInfo:
    """What a memory file says about itself.

    Attributes:
        path: of the file.
        saved_at: when it was written, ISO 8601, UTC.
        layers: transformer layers with TTT.
        num_frames: heard by each row.
        drift: relative change of the fast weights, `|W - W0| / |W0|`, by layer and row.
    """

    path: Path
    saved_at: str
    layers: list[int]
    num_frames: list[int]
    drift: dict[int, list[float]]


@torch.no_grad()
def save_ttt_states(model: LMModel | LMGen, path: str | Path) -> None:
    """Write the fast weights of a streaming model, half-finished mini-batches included.

    Args:
        model: a patched model inside `streaming()`.
        path: of the safetensors file; an older one is replaced.

    Raises:
        ValueError: the model is not streaming or has no TTT layers.
        StateError: the file cannot be written.
    """
    model = _language_model(model)
    states = streaming_states(model)
    tensors = {name: t for index, state in states.items() for name, t in _tensors(index, state).items()}
    first = next(iter(states.values()))
    identity = {
        "layers": {str(index): layer_identity(layer) for index, layer in ttt_layers(model).items()},
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "num_frames": first.num_tokens.tolist(),
        "drift": {str(index): fast_weight_drift(state).tolist() for index, state in states.items()},
    }
    write_state_file(path, tensors, kind=KIND, identity=identity)


@torch.no_grad()
def load_ttt_states(model: LMModel | LMGen, path: str | Path, *, rows: Sequence[int] | None = None) -> None:
    """Let a streaming model go on with the fast weights of a file.

    Args:
        model: a patched model inside `streaming()`; unchanged when the file does not fit.
        path: written by `save_ttt_states`.
        rows: for each row of the model, the row of the file (None: the same; a file with one row goes to
            every row).

    Raises:
        ValueError: the model is not streaming or has no TTT layers.
        StateError: the file is corrupt or belongs to another model; says what differs.
    """
    model = _language_model(model)
    states = streaming_states(model)
    file = StateFile(path, kind=KIND)
    _check_identity(file, {str(index): layer_identity(layer) for index, layer in ttt_layers(model).items()})
    num_rows = len(file.identity["num_frames"])
    chosen = _choose_rows(file, rows, num_rows=num_rows, batch_size=next(iter(states.values())).batch_size)
    targets = {name: t for index, state in states.items() for name, t in _tensors(index, state).items()}
    file.check_shapes({name: (num_rows, *target.shape[1:]) for name, target in targets.items()})
    values = {}
    for name, value in file.read().items():
        _check_dtype(file, name, value)
        values[name] = value[chosen].to(targets[name].dtype)
        _check_values(file, name, values[name], mini_batch_size=next(iter(states.values())).mini_batch_size)
    for name, target in targets.items():
        target.copy_(values[name])


@torch.no_grad()
def forget_ttt_states(model: LMModel | LMGen, rows: Tensor | None = None) -> None:
    """Give rows of a streaming model fresh fast weights; attention and delays go on.

    Args:
        model: a patched model inside `streaming()`.
        rows: boolean `[B]`; None: all.

    Raises:
        ValueError: the model is not streaming or has no TTT layers.
    """
    for state in streaming_states(_language_model(model)).values():
        mask = torch.ones_like(state.exec_mask) if rows is None else rows.to(state.device)
        state.forget(mask)


def inspect_ttt_states(path: str | Path) -> MemoryInfo:
    """What a memory file holds, from its header alone.

    Raises:
        StateError: it is not a memory file, or damaged.
    """
    file = StateFile(path, kind=KIND)
    identity = file.identity
    try:
        saved_at = datetime.fromisoformat(identity["saved_at"]).isoformat(timespec="seconds")
        layers = sorted(int(index) for index in identity["layers"])
        num_frames = [int(count) for count in identity["num_frames"]]
        drift = {layer: [float(x) for x in identity["drift"][str(layer)]] for layer in layers}
        if any(len(values) != len(num_frames) for values in drift.values()) or max(num_frames) >= 2**63:
            raise ValueError("rows do not fit")
        return MemoryInfo(file.path, saved_at, layers, num_frames, drift)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise StateError(f"{file.path}: what identifies its model is damaged.") from None


def list_ttt_states(folder: str | Path) -> list[MemoryInfo]:
    """The memory files of a folder, by name; other files are passed over.

    Raises:
        StateError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StateError(f"{folder}: is not a folder.")
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.append(inspect_ttt_states(path))
        except StateError:
            continue
    return found


def layer_identity(layer: TTTLayer) -> dict[str, Any]:
    """What a memory must share with a layer: the inner network's shape, and `W0` by its hash."""
    config = layer.config
    digest = hashlib.sha256()
    for parameter in (*layer.weights, *layer.biases, layer.ttt_norm_weight, layer.ttt_norm_bias):
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "num_heads": config.num_heads,
        "inner_dims": config.inner_dims(config.head_dim),
        "mini_batch_size": config.mini_batch_size,
        "key_shift": config.key_shift,
        "w0_sha256": digest.hexdigest(),
    }


def fast_weight_drift(state: TTTStreamingState) -> Tensor:
    """`|W - W0| / |W0|` of each row, over all inner layers and heads. `[B]`."""
    changed = [
        (now - start).square().flatten(1).sum(1)
        for now, start in zip(state.buffers.start_weights, state.inner.weights, strict=True)
    ]
    initial = [start.square().sum() for start in state.inner.weights]
    return (reduce(torch.add, changed) / reduce(torch.add, initial)).sqrt()


def _language_model(model: LMModel | LMGen) -> LMModel:
    return model.lm_model if isinstance(model, LMGen) else model


def _tensors(index: int, state: TTTStreamingState) -> dict[str, Tensor]:
    """The buffers of a layer that make up its memory, by their name in the file."""
    named = {
        f"layers.{index}.{part}.{number}": tensor
        for part, tensors in state.buffers._asdict().items()
        for number, tensor in enumerate(tensors)
    }
    if state.heard is not None:
        named |= {f"layers.{index}.heard.{part}": t for part, t in state.heard._asdict().items()}
    return named | {
        f"layers.{index}.offsets": state.offsets,
        f"layers.{index}.num_tokens": state.num_tokens,
    }


def _check_identity(file: StateFile, ours: Mapping[str, Mapping[str, Any]]) -> None:
    theirs = file.identity.get("layers")
    if not isinstance(theirs, dict) or not isinstance(file.identity.get("num_frames"), list):
        raise StateError(f"{file.path}: what identifies its model is damaged.")
    if theirs.keys() != ours.keys():
        raise StateError(
            f"{file.path}: is the memory of TTT layers {', '.join(theirs) or 'none'}, this model has them in "
            f"{', '.join(ours)}."
        )
    for index, identity in ours.items():
        for key, value in identity.items():
            layer = theirs[index] if isinstance(theirs[index], dict) else {}
            found = layer.get(key, BEFORE_THERE_WERE_KEYS.get(key))
            if found == value:
                continue
            if key == "w0_sha256":
                raise StateError(
                    f"{file.path}: is the memory of another checkpoint, the initial fast weights W0 of layer "
                    f"{index} differ."
                )
            raise StateError(f"{file.path}: {key} of layer {index} is {found}, this model has {value}.")


def _choose_rows(file: StateFile, rows: Sequence[int] | None, *, num_rows: int, batch_size: int) -> list[int]:
    if rows is None:
        rows = [0] * batch_size if num_rows == 1 else list(range(num_rows))
    if len(rows) != batch_size:
        raise StateError(f"{file.path}: {len(rows)} rows for a batch of {batch_size}; use 1 or as many.")
    for row in rows:
        if not 0 <= row < num_rows:
            raise StateError(f"{file.path}: has no row {row}, there are {num_rows}.")
    return list(rows)


def _is_counter(name: str) -> bool:
    return name.endswith((".offsets", ".num_tokens", ".heard.num_heard"))


def _check_dtype(file: StateFile, name: str, value: Tensor) -> None:
    allowed = (torch.long,) if _is_counter(name) else (torch.float32, torch.float64)
    if value.dtype not in allowed:
        raise StateError(f"{file.path}: {name} has dtype {value.dtype}.")


def _check_values(file: StateFile, name: str, value: Tensor, *, mini_batch_size: int) -> None:
    if not value.isfinite().all():
        raise StateError(f"{file.path}: {name} holds values that are not finite numbers.")
    highest = mini_batch_size - 1 if name.endswith(".offsets") else 2**48
    if _is_counter(name) and ((value < 0).any() or (value > highest).any()):
        raise StateError(f"{file.path}: {name} is out of range.")
