"""The command of the installed package, `moshi-ttt`: one name for every command line of the project.

Several processes start with `torchrun --no-python --nproc-per-node 8 moshi-ttt train config.yaml`.
"""

import difflib
import importlib
import sys
from typing import NamedTuple, NoReturn

from finetune.commands import loading, run_command
from finetune.errors import ConfigError
from moshi_ttt import __version__


class Command(NamedTuple):
    """A command line: the function that takes its arguments, and the form without `moshi-ttt`."""

    module: str
    function: str
    script: str
    help: str


COMMANDS = {
    "train": Command(
        "finetune.training.command", "train", "train.py", "fine-tune Moshi with TTT layers; --dry-run plans"
    ),
    "generate": Command(
        "finetune.inference.command", "generate", "generate.py", "talk to a trained model with a recording"
    ),
    "serve": Command("finetune.serving.command", "serve", "serve.py", "talk to it in a browser"),
    "evaluate": Command(
        "finetune.evaluation.command",
        "evaluate",
        "evaluate.py",
        "measure it: memory, conversation, spoken tasks",
    ),
    "annotate": Command(
        "finetune.annotation.command", "annotate", "annotate.py", "write word timings beside recordings"
    ),
    "data manifest": Command(
        "finetune.data.manifest",
        "write_manifest",
        "python -m finetune.data.manifest",
        "list a folder of recordings",
    ),
    "data check": Command(
        "finetune.data.check.command", "check", "python -m finetune.data.check", "find faults in a data set"
    ),
    "data convert": Command(
        "finetune.data.convert.command",
        "convert",
        "python -m finetune.data.convert",
        "data sets in the layouts of others",
    ),
    "data encode": Command(
        "finetune.data.encode",
        "encode",
        "python -m finetune.data.encode",
        "encode recordings before training",
    ),
    "export": Command(
        "finetune.export.command",
        "export",
        "python -m finetune.export",
        "a checkpoint as a folder for others",
    ),
    "extend": Command(
        "finetune.extend.command",
        "extend",
        "python -m finetune.extend",
        "another tokenizer, the user's stream predicted",
    ),
    "memory": Command(
        "finetune.memory",
        "memory",
        "python -m finetune.memory",
        "list, inspect, forget memories of conversations",
    ),
    "diagnose": Command(
        "finetune.diagnose.command", "diagnose", "python -m finetune.diagnose", "is a run healthy?"
    ),
    "demo": Command(
        "finetune.demo.command", "demo", "python -m finetune.demo", "make a small Moshi and dialogues for it"
    ),
    "demo memory": Command(
        "finetune.demo.memory.command",
        "demo_memory",
        "python -m finetune.demo.memory",
        "what the memory gives; in the repository",
    ),
    "demo recall": Command(
        "finetune.demo.recall.command",
        "demo_recall",
        "python -m finetune.demo.recall",
        "conversations to measure with what is remembered",
    ),
    "demo debian-prompts": Command(
        "finetune.demo.debian_prompts.command",
        "debian_prompts",
        "python -m finetune.demo.debian_prompts",
        "dialogues of human voices from Debian's packages",
    ),
    "demo human-dialogues": Command(
        "finetune.demo.human_dialogues.command",
        "human_dialogues",
        "python -m finetune.demo.human_dialogues",
        "dialogues of actors from games in Debian",
    ),
}


def main() -> NoReturn:
    """Entry point of `moshi-ttt`."""
    run_command(lambda: _run(sys.argv[1:]))


def command_map() -> str:
    """The help text: every command with what it does and its form without `moshi-ttt`."""
    width, help_width = max(map(len, COMMANDS)), max(len(command.help) for command in COMMANDS.values())
    lines = [
        f"  {name:<{width}}  {command.help:<{help_width}}  {command.script}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: moshi-ttt COMMAND ...",
            "",
            "Fine-tune Moshi with Test-Time-Training layers. `moshi-ttt COMMAND --help` says more;",
            "on the right stands the same command of the repository.",
            "",
            *lines,
            "",
            "  --version  print the version",
        ]
    )


def _run(arguments: list[str]) -> int | None:
    if arguments[:1] in ([], ["-h"], ["--help"]):
        print(command_map())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"moshi-ttt {__version__}")
        return 0
    name = " ".join(arguments[:2])
    if name not in COMMANDS:
        name = arguments[0]
    if name not in COMMANDS:
        raise _unknown(arguments)
    command = COMMANDS[name]
    # Help texts and messages go by the name that was typed.
    sys.argv = [f"moshi-ttt {name}", *arguments[len(name.split()) :]]
    with loading():
        function = getattr(importlib.import_module(command.module), command.function)
    return function(sys.argv[1:])


def _unknown(arguments: list[str]) -> ConfigError:
    typed = arguments[0]
    within = [name for name in COMMANDS if name.startswith(f"{typed} ")]
    if within:
        return ConfigError(f"moshi-ttt {typed}: which one? {', '.join(within)}.")
    near = difflib.get_close_matches(typed, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "see moshi-ttt --help."
    return ConfigError(f"moshi-ttt {typed}: unknown command, {hint}")
