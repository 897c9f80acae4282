"""Training configurations between YAML, nested dictionaries and `TrainArgs`, with one-line errors."""

import dataclasses
import difflib
import io
import types
import typing
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.args import TrainArgs
from finetune.errors import ConfigError, one_line
from moshi_ttt.config import BEFORE_THERE_WERE_KEYS

ARGS_FILE = "args.yaml"  # of the run
_REPLACEMENTS = {
    "*ttt_fig5_enable": "ttt.log_inner_loop_losses",
    "*ttt_fig5_*": "the keys ttt.log_inner_loop_losses, ttt.inner_loop_log_interval and "
    "ttt.inner_loop_plot_dir",
    "*librilight_evaluation_mode*": "the command `evaluate.py long-context`",
    "*librilight_*": "the command `evaluate.py long-context`",
    "*paper_metrics_*": "the command `evaluate.py`",
    "training.lr": "optim.lr",
    "training.batch_size": "batch_size",
    "training.max_steps": "max_steps",
    "training.*": "the same key at the top level or under optim:",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "pct_start": "optim.pct_start",
    "ttt.ttt_base_lr": "ttt.base_lr",
    "ttt.gating_alpha_init": "ttt.initial_gating_alpha",
    "ttt.mini_batch": "ttt.mini_batch_size",
    "ttt.ttt_layers": "ttt.layers",
    "ttt_*": "the section ttt:",
    "world_size": "torchrun --nproc-per-node",
}


def load_train_args(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainArgs:
    """Read a YAML file and build `TrainArgs`.

    Args:
        path: the YAML file.
        overrides: values that replace the file's, by dotted key (`{"optim.lr": 1e-4}`).

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; one line.
    """
    return _with_overrides(path, read_yaml(path), overrides)


def _with_overrides(
    path: str | Path, values: dict[str, Any], overrides: Mapping[str, Any] | None
) -> TrainArgs:
    for key, value in (overrides or {}).items():
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{path}: {parent}: is not a section, {key} cannot be set in it.")
        section[leaf] = value
    return build_args(TrainArgs, values)


def load_run_args(run_dir: Path, overrides: Mapping[str, Any] | None = None) -> TrainArgs:
    """The configuration that a run wrote into its directory.

    Args:
        run_dir: of the run.
        overrides: values that replace the file's, by dotted key.

    Raises:
        ConfigError: this is no run, or its configuration is wrong.
    """
    path = run_dir / ARGS_FILE
    if not path.exists():
        if run_dir.is_dir():
            what = f"has no {ARGS_FILE}"
        else:
            what = "is not a folder" if run_dir.exists() else "does not exist"
        raise ConfigError(f"{run_dir}: {what}; give the run_dir of a training.")
    return _with_overrides(path, as_recorded(read_yaml(path)), overrides)


def as_recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version may have written, with what its missing keys mean.

    Args:
        values: a whole configuration, or a checkpoint's description that has a `ttt` section.
    """
    ttt = values.get("ttt")
    if not isinstance(ttt, dict):
        return dict(values)
    return {**values, "ttt": {**BEFORE_THERE_WERE_KEYS, **ttt}}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML 1.2 mapping (so that 1e-4 is a number), sections that are left empty removed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"{path}: cannot read the configuration: {reason}.") from None
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {one_line(error)}") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}.")
    return {
        key: value for key, value in values.items() if value is not None or _section(TrainArgs, key) is None
    }


def dump_yaml(args: TrainArgs) -> str:
    """The configuration as YAML that `load_train_args` reads back, without secrets."""
    stream = io.StringIO()
    YAML().dump(public_values(args), stream)
    return stream.getvalue()


def build_args(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a (nested) dataclass of `finetune.args` from a mapping.

    Raises:
        ConfigError: names the dotted key, the value and what is allowed.
    """
    kwargs: dict[str, Any] = {}
    fields = field_infos(cls)
    for key, value in values.items():
        if key not in fields:
            inner = f".{next(iter(value))}" if isinstance(value, dict) and value else ""
            raise unknown_key(f"{prefix}{key}{inner}")
        section = _section(cls, key)
        if section is not None:
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key}: {value!r} is not a section of keys and values.")
            value = build_args(section, value, f"{prefix}{key}.")
        kwargs[key] = value
    try:
        return cls(**kwargs)
    except ValidationError as error:
        raise ConfigError(_describe(cls, error, prefix)) from None


def field_infos(cls: type) -> dict[str, FieldInfo]:
    """The pydantic fields of one of our dataclasses, by name, in order."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined]


def all_keys(cls: type = TrainArgs, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a configuration with its field."""
    for name, info in field_infos(cls).items():
        section = _section(cls, name)
        if section is not None:
            yield from all_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def type_name(annotation: Any) -> str:
    """How an annotation reads to a user: `int or null`."""
    if annotation is type(None):
        return "null"
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    if origin is dict:
        return "names with texts, {name: text}"
    if origin in (list, tuple):
        part = type_name(typing.get_args(annotation)[0])
        return f"list of ({part})" if " or " in part else f"list of {part}"
    return {"str": "text", "float": "number", "int": "whole number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def yaml_text(value: Any) -> str:
    """A value as it stands in YAML, where Python writes it differently."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def public_values(args: TrainArgs) -> dict[str, Any]:
    """The configuration as nested dictionaries, without secrets."""
    values = dataclasses.asdict(args)
    values["wandb"]["key"] = None
    return values


def _section(cls: type, key: str) -> type | None:
    """The dataclass of a section, None where the key is none."""
    info = field_infos(cls).get(key)
    annotation = None if info is None else info.annotation
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def unknown_key(key: str) -> ConfigError:
    """The error for a dotted key that does not exist: its replacement, or the nearest key."""
    replacement = replacement_for(key)
    if replacement is not None:
        return ConfigError(f"{key}: this key does not exist here, use {replacement}.")
    known = [name for name, _ in all_keys()]
    matches = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
        key.split(".")[-1], [name.split(".")[-1] for name in known], n=1
    )
    hint = f", did you mean {matches[0]}?" if matches else "; `python train.py --help` lists all keys."
    return ConfigError(f"{key}: unknown key{hint}")


def _describe(cls: type, error: ValidationError, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    location = [part for part in first["loc"] if part in field_infos(cls)]
    if not location:
        # From a validator of ours: the message names the key.
        return f"{prefix}{first['msg'].removeprefix('Value error, ')}."
    info = field_infos(cls)[location[0]]
    if first["type"].startswith(("greater", "less", "finite")):
        expected = first["msg"].replace("Input should be", "must be")
    else:
        expected = f"expected {type_name(info.annotation)}"
    return f"{prefix}{location[0]}: {yaml_text(first['input'])} is not allowed, {expected}."


def replacement_for(key: str) -> str | None:
    """What to write instead of `key` (dotted), or None when nothing is known about it."""
    for pattern, replacement in _REPLACEMENTS.items():
        if fnmatch(key, pattern):
            return replacement
    return None
