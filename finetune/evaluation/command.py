"""The command line of evaluate.py: one subcommand per measurement."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from finetune.commands import Parser
from finetune.distributed import set_up_logging
from finetune.evaluation import inner_losses as trajectories
from finetune.evaluation.duplex import command as duplex
from finetune.evaluation.long_context import command as long_context
from finetune.evaluation.recall import command as recall
from finetune.evaluation.spoken import command as spoken
from finetune.evaluation.spoken.tasks import TASKS
from finetune.evaluation.transcription import command as transcription
from finetune.evaluation.watch import command as watch


class Subcommand(NamedTuple):
    """A measurement.

    Attributes:
        name: what it is called on the command line.
        help: what it does, in a line.
        add_options: gives a parser its options.
        run: does what the parsed options say.
        is_resumable: whether it goes on in the folder of an unfinished one.
    """

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    is_resumable: bool = False


def _watch(options: argparse.Namespace) -> None:
    resumable = [subcommand.name for subcommand in SUBCOMMANDS if subcommand.is_resumable]
    watch.run(options, prepare=_prepare, resumable=resumable)


SUBCOMMANDS = (
    Subcommand(
        "long-context", long_context.HELP, long_context.add_options, long_context.run, is_resumable=True
    ),
    Subcommand("recall", recall.HELP, recall.add_options, recall.run, is_resumable=True),
    *(
        Subcommand(name, spoken.help_of(name), spoken.add_options, partial(spoken.run, name))
        for name in (*TASKS, spoken.ALL)
    ),
    Subcommand("duplex", duplex.HELP, duplex.add_options, duplex.run, is_resumable=True),
    Subcommand(
        "transcription", transcription.HELP, transcription.add_options, transcription.run, is_resumable=True
    ),
    Subcommand("trajectories", trajectories.HELP, trajectories.add_options, trajectories.run),
    Subcommand("watch", watch.HELP, watch.add_options, _watch),
)


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says, see `python evaluate.py --help`.

    Raises:
        UserError: an option, a file or the checkpoint cannot be used, or too many recordings failed.
        StateError: results cannot be written.
    """
    measurement = _prepare(arguments)
    set_up_logging(lines_to_stdout=False)
    measurement()


def _prepare(arguments: Sequence[str] | None) -> Callable[[], None]:
    """What does what a command line says, parsed."""
    parser = Parser(prog="evaluate.py", description="Measure a trained model.", allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="MEASUREMENT", dest="measurement")
    for subcommand in SUBCOMMANDS:
        added = subparsers.add_parser(
            subcommand.name, help=subcommand.help, description=subcommand.help, allow_abbrev=False
        )
        subcommand.add_options(added)
        added.set_defaults(run=subcommand.run)
    options = parser.parse_args(arguments)
    return partial(options.run, options)
