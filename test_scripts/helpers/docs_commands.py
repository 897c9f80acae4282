"""Code blocks of the documentation, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from project_root import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_SEPARATORS = {"&&", ";"}
_OPERATORS = {"|", ">", "<", ">>"}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: where it is, from the repository's root.
        line: of its first line of content, from 1.
        language: what stands behind the fence, may be empty.
        text: its content.
    """

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """A command of a `bash` block.

    Attributes:
        places: where it stands, `page:line`.
        words: program and arguments without quotes, up to the first pipe or redirection; the program without
            `.venv/bin/`.
        source: the lines as they are written, for a shell.
    """

    places: tuple[str, ...]
    words: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        """The words as one line."""
        return " ".join(self.words)


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    blocks, begin, language = [], None, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```(\w*)", line)
        if fence is None:
            continue
        if begin is None:
            begin, language = number, fence[1]
        else:
            text = "\n".join(lines[begin + 1 : number])
            blocks.append(Block(str(page.relative_to(ROOT)), begin + 2, language, text))
            begin = None
    if begin is not None:
        raise ValueError(f"{page}:{begin + 1}: a block without an end")
    return blocks


def blocks_of(language: str) -> list[Block]:
    """All blocks of a language."""
    return [block for page in PAGES for block in read_blocks(page) if block.language == language]


def commands_of(block: Block) -> list[Command]:
    """The commands of a block in their order: lines joined, comments cut, split at `&&` and `;`."""
    commands = []
    lines = block.text.splitlines()
    first = 0
    for number, line in enumerate(lines):
        if line.endswith("\\"):
            continue
        source = "\n".join(lines[first : number + 1])
        place = f"{block.page}:{block.line + first}"
        first = number + 1
        commands += [Command((place,), tuple(words), source) for words in _split(source)]
    return commands


def distinct_commands() -> list[Command]:
    """The commands of all pages; what is written in several places comes once, with all of them."""
    merged: dict[tuple[str, ...], Command] = {}
    for block in blocks_of("bash"):
        for command in commands_of(block):
            known = merged.get(command.words)
            places = (known.places if known else ()) + command.places
            merged[command.words] = command._replace(places=places)
    return list(merged.values())


def _split(source: str) -> list[list[str]]:
    """The words of each command of a line."""
    text = source.replace("\\\n", " ").replace("2>&1", "")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word in _SEPARATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    return [_program_first(words) for words in commands if words]


def _program_first(words: list[str]) -> list[str]:
    end = next((index for index, word in enumerate(words) if word in _OPERATORS), len(words))
    return [words[0].removeprefix(".venv/bin/"), *words[1:end]]
