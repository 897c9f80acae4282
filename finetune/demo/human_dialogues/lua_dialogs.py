"""Texts, speakers and order of dialogues in the scripts of Fish Fillets NG, which are written in Lua.

`dialogs_<language>.lua` has the lines, `dialogId(name, font, English)` and `dialogStr(translation)`; the
font says who speaks. The other scripts of a room say when which line is heard: `addm(20, "name")`, and where
one of several is drawn, `addv(5, "name" .. number)`. The order is that of the scripts' text; nothing is
executed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_STRING = r'"((?:[^"\\\n]|\\.)*)"'
_LINE = re.compile(
    rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\)\s*dialogStr\(\s*{_STRING}\s*\)"
)
_COMMENT = re.compile(r"^\s*--.*$", re.MULTILINE)
_MENTION = re.compile(rf"{_STRING}(\s*\.\.)?")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class Dialog(NamedTuple):
    """A line of the script: its name, the font that it is written in, and its text in the language."""

    name: str
    font: str
    text: str


def read_dialogs(script: str) -> list[Dialog]:
    """The lines of a `dialogs_<language>.lua`, in order."""
    found = (match.groups() for match in _LINE.finditer(_COMMENT.sub("", script)))
    return [
        Dialog(name, font, " ".join(_ESCAPED.sub(_unescape, text).split())) for name, font, _, text in found
    ]


def script_order(names: Sequence[str], code: str) -> list[str]:
    """The names of lines in the order in which the code of a room mentions them, each once.

    Where the code draws one of several lines, the first is taken. The others follow when all of the code has
    been gone through, in a second round and further ones, as when the room is played again. A line that the
    code does not mention comes after the one that it follows in `names`.

    Args:
        names: of the lines, as the file of the texts has them.
        code: the room's other scripts.
    """
    places = list(_places(names, code))
    mentioned = {name for place in places for name in place}
    ordered: list[str] = []
    while len(ordered) < len(mentioned):
        for place in places:
            unsaid = [name for name in place if name not in ordered]
            ordered += unsaid[:1]
    for index, name in enumerate(names):
        if name not in mentioned:
            ordered.insert(ordered.index(names[index - 1]) + 1 if index else 0, name)
    return ordered


def _places(names: Sequence[str], code: str) -> Iterator[list[str]]:
    """The lines that may be heard at each place of the code."""
    for match in _MENTION.finditer(_COMMENT.sub("", code)):
        mention, joined = match.groups()
        if joined:
            numbered = {
                int(end): name
                for name in names
                if name.startswith(mention) and (end := name[len(mention) :]).isdecimal()
            }
            yield [numbered[number] for number in sorted(numbered)]
        elif mention in names:
            yield [mention]


def _unescape(match: re.Match[str]) -> str:
    return " " if match[1] in "nt\n" else match[1]
