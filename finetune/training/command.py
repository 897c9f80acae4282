"""The command line of train.py: a YAML file, overrides of any key, --help and --dry-run."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune.args import TrainArgs
from finetune.checkpoint.layout import run_dir_of
from finetune.commands import Parser
from finetune.config_io import all_keys, load_run_args, load_train_args, type_name, unknown_key, yaml_text
from finetune.errors import ConfigError
from finetune.training.plan.dry_run import dry_run
from finetune.training.run import run_training

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class TrainCommand:
    """What the arguments of train.py ask for; the GPUs are those that a dry run assumes."""

    args: TrainArgs
    dry_run: bool
    num_gpus: int
    gpu_memory_gb: float | None


def train(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says, see `python train.py --help`.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        The exit status: 1 where a dry run finds that the memory of a GPU is too small.

    Raises:
        UserError: the configuration, the data or a file cannot be used.
        TrainingDivergedError: the training cannot go on.
    """
    command = parse_train_command(sys.argv[1:] if arguments is None else arguments)
    if command.dry_run:
        return dry_run(command.args, num_gpus=command.num_gpus, gpu_memory_gb=command.gpu_memory_gb)
    run_training(command.args)
    return 0


def parse_train_command(argv: Sequence[str]) -> TrainCommand:
    """Parse the arguments of train.py.

    Raises:
        ConfigError: an option, key or value is wrong; one line.
    """
    parser = _train_parser()
    known, unknown = parser.parse_known_args(_join_negative_numbers(argv))
    if unknown and unknown[0].startswith("--"):
        raise unknown_key(unknown[0].removeprefix("--").partition("=")[0])
    if unknown:
        raise ConfigError(f"{unknown[0]}: unexpected argument (see --help).")
    if known.yaml is not None and known.config is not None:
        raise ConfigError(f"Two configurations given: {known.yaml} and --config {known.config}; give one.")
    path = known.config or known.yaml
    resumed = None
    if path is None and known.resume not in (None, "auto", "null"):
        # A run knows its own configuration; it may have been moved since, or branches into another.
        resumed = run_dir_of(known.resume)
        known.run_dir = known.run_dir or str(resumed)
    if path is None and resumed is None:
        raise ConfigError("No configuration given: python train.py --config example/quickstart.yaml")
    fields = dict(all_keys())
    overrides = {
        key: parse_value(fields[key], text, key)
        for key, text in vars(known).items()
        if key in fields and text is not None
    }
    args = load_train_args(path, overrides) if resumed is None else load_run_args(resumed, overrides)
    return TrainCommand(args, known.dry_run, *_assumed_gpus(known))


def parse_value(info: FieldInfo, text: str, key: str) -> Any:
    """The value of one key from the text of the command line, as the YAML would give it."""
    if info.annotation is str:
        return text  # a run called 2024 is a name, not a number
    if info.annotation == str | None:
        return None if text == "null" else text
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{key}: cannot read {text!r}, expected {type_name(info.annotation)}.") from None


def _assumed_gpus(known: argparse.Namespace) -> tuple[int, float | None]:
    """The GPUs that a dry run assumes: their number, and the memory of one in GB where it is given."""
    for option, text in (("--gpus", known.gpus), ("--gpu-memory-gb", known.gpu_memory_gb)):
        if text is not None and not known.dry_run:
            raise ConfigError(f"{option}: {text} belongs to a dry run; add --dry-run or leave it out.")
    num_gpus = _number("--gpus", known.gpus or "1", int, 1, 65536)
    if known.gpu_memory_gb is None:
        return num_gpus, None
    return num_gpus, _number("--gpu-memory-gb", known.gpu_memory_gb, float, 0.001, 100_000)


def _number(option: str, text: str, kind: type[_Number], lowest: _Number, highest: _Number) -> _Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not lowest <= value <= highest:
        word = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{option}: {text!r} is not {word} from {lowest:g} to {highest:g}.")
    return value


def _train_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Fine-tune Moshi with Test-Time-Training layers.",
        epilog="Every key of the YAML is an option: --ttt.layers 29,30,31 --optim.lr 1e-4",
        allow_abbrev=False,
    )
    parser.add_argument("yaml", nargs="?", metavar="CONFIG", help="the YAML file")
    parser.add_argument("--config", metavar="CONFIG", help="the YAML file, as an option")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, print the summary of the model and stop"
    )
    parser.add_argument("--gpus", metavar="N", help="with --dry-run: GPUs of the memory estimate [default 1]")
    parser.add_argument(
        "--gpu-memory-gb",
        metavar="X",
        help="with --dry-run: memory of one GPU; exit status 1 if it is too small",
    )
    groups: dict[str, Any] = {}
    for key, info in all_keys():
        section = key.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}:" if section else "top level")
        text = f"{info.description} [{type_name(info.annotation)}; default {_default_text(info)}]"
        groups[section].add_argument(f"--{key}", dest=key, metavar="VALUE", help=text.replace("%", "%%"))
    return parser


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """`--key -1e-3` as `--key=-1e-3`: argparse takes such a number for an option."""
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-[.\d]", argument) and joined and re.match(r"--[^=]+$", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _default_text(info: FieldInfo) -> str:
    default = info.get_default(call_default_factory=True)
    if isinstance(default, str):
        return default or "unset"
    return yaml_text(default)
