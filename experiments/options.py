"""Options that the experiments' command lines share."""

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from finetune.commands import Parser
from finetune.errors import ConfigError
from finetune.inference.options import positive_integer


def check_only(only: Sequence[str] | None, labels: Collection[str]) -> None:
    """See that the runs that `--only` names exist.

    Raises:
        ConfigError: names one that does not, and those that do.
    """
    unknown = sorted(set(only or ()) - set(labels))
    if unknown:
        raise ConfigError(f"--only: there is no run {unknown[0]!r}, choose from {', '.join(labels)}.")


def steps_parser(module: str, description: str | None, *, out: Path) -> Parser:
    """The parser of an experiment that trains a base and fine-tunes it, with what such experiments share.

    Args:
        module: what `python -m` starts.
        description: of the experiment, shown as it is written.
        out: where everything goes if nothing else is said.
    """
    parser = Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=out, help="folder of everything (%(default)s)")
    parser.add_argument("--seeds", type=positive_integer, nargs="+", default=[1, 2, 3], help="one run each")
    parser.add_argument("--base-steps", type=positive_integer, help="instead of the configuration's")
    parser.add_argument(
        "--steps", type=positive_integer, help="of fine-tuning, instead of the configuration's"
    )
    return parser
