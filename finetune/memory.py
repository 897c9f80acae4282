"""Command line: `python -m finetune.memory list|inspect|forget`, the memory files of conversations."""

import argparse
from pathlib import Path

from moshi.models.loaders import FRAME_RATE

from finetune.commands import Parser, run_command
from moshi_ttt.memory import MemoryInfo, inspect_ttt_states, list_ttt_states


def memory(arguments: list[str] | None = None) -> int:
    """Do what the command line says.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit status, 0.

    Raises:
        UserError: an option is wrong.
        StateError: a file is not a memory, or damaged.
    """
    options = _parse(arguments)
    if options.action == "list":
        found = list_ttt_states(options.path)
        print(*([_one_line(info) for info in found] or [f"no memory files in {options.path}"]), sep="\n")
        return 0
    info = inspect_ttt_states(options.path)
    if options.action == "inspect":
        print(*_description(info), sep="\n")
    else:
        options.path.unlink()
        print(f"forgot {options.path}")
    return 0


def _one_line(info: MemoryInfo) -> str:
    rows = len(info.num_frames)
    seconds = max(info.num_frames, default=0) / FRAME_RATE
    return f"{info.path}  {info.saved_at}  {rows} row{'s' * (rows != 1)}, {seconds:.1f} s heard"


def _description(info: MemoryInfo) -> list[str]:
    lines = [
        f"file: {info.path}",
        f"saved: {info.saved_at}",
        f"layers: {', '.join(map(str, info.layers))}",
    ]
    for row, num_frames in enumerate(info.num_frames):
        changes = ", ".join(f"layer {index} {values[row]:.2%}" for index, values in info.drift.items())
        seconds = num_frames / FRAME_RATE
        lines.append(f"row {row}: {num_frames:,} frames ({seconds:.1f} s), fast weights changed by {changes}")
    return lines


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m finetune.memory", description="Memory files of conversations.")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("list", "the memory files of a folder"),
        ("inspect", "what one file holds"),
        ("forget", "delete one file, after a look that it is a memory"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("path", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(memory)
