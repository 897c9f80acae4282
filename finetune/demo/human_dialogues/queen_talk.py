"""Conversations that the player of Flight of the Amazon Queen steers: what Joe may say, and the answers.

A `.DOG` file has levels of up to four things that Joe may say. Each is a number: the answer has the same one,
and so has the level that follows, where there is one. The layout is known from ScummVM's talk.cpp.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from finetune.demo.human_dialogues.material import Line
from finetune.demo.human_dialogues.queen_archive import Archive, read_numbers, read_text
from finetune.demo.human_dialogues.queen_lines import sentence_lines

_TREE = 32  # where the levels begin
_NODES = 6  # of a level: the answer that leads to it, four things to say, an unused one
_NODE_BYTES = 16
_LEAVE = -1


class Node(NamedTuple):
    """Something to say: its number, and the number of the level after it; -1 ends the conversation."""

    number: int
    next: int


class Talk(NamedTuple):
    """A conversation.

    Attributes:
        key: number of the conversation in the names of recordings.
        joe: what Joe says, by number.
        other: what the other says, by number.
        again: what both say when they meet again: Joe and the other.
        levels: of nodes, the first of which is the answer that leads to the level.
    """

    key: int
    joe: dict[int, str]
    other: dict[int, str]
    again: tuple[str, str]
    levels: list[list[Node]]


def read_talk(data: bytes) -> Talk:
    """Read a `.DOG` file.

    Args:
        data: without its header.

    Raises:
        struct.error: it is damaged.
    """
    num_levels, _, key, num_joe, num_other = read_numbers(data, 0, 5)
    num_levels = abs(num_levels)
    others_begin, _, again_begin = read_numbers(data, 22, 3)
    levels = [
        [_node(data, _TREE + (level * _NODES + index) * _NODE_BYTES) for index in range(_NODES - 1)]
        for level in range(num_levels)
    ]
    other_again, offset = read_text(data, again_begin, align=2)
    joe_again, _ = read_text(data, offset, align=2)
    joe = _sentences(data, _TREE + num_levels * _NODES * _NODE_BYTES, num_joe)
    return Talk(key, joe, _sentences(data, others_begin, num_other), (joe_again, other_again), levels)


def talk_lines(archive: Archive, name: str) -> list[Line]:
    """The lines of a `.DOG` file for a player who asks everything, and asks on before asking something else.

    Each is heard once. What takes leave comes last, what is said at another meeting after it. The conditions
    of the game's state, under which something is not to be asked yet, are not regarded.

    Raises:
        UserError: the file is damaged.
    """
    try:
        talk = read_talk(archive.read_script(name))
    except struct.error as error:
        raise archive.damaged(f"{name}: {error}") from error
    lines: list[Line] = []

    def say(sentence: str, number: str, *, by_joe: bool) -> None:
        prefix = f"{talk.key:02d}{number}{'J' if by_joe else 'P'}"
        lines.extend(sentence_lines(archive, prefix, sentence, by_first=by_joe))

    say(talk.joe.get(0, ""), "SSSS", by_joe=True)
    for number, by_joe in _order(talk):
        sentences = talk.joe if by_joe else talk.other
        say(sentences[number], f"{number & 0xFFFF:04X}", by_joe=by_joe)
    for sentence, by_joe in zip(talk.again, (True, False), strict=True):
        say(sentence, "XXXX", by_joe=by_joe)
    return lines


def _node(data: bytes, offset: int) -> Node:
    _, number, _, following = read_numbers(data, offset, 4)
    return Node(number, following)


def _sentences(data: bytes, offset: int, count: int) -> dict[int, str]:
    sentences: dict[int, str] = {}
    for _ in range(count):
        _, number = read_numbers(data, offset, 2)
        sentence, offset = read_text(data, offset + 4, align=4)
        sentences.setdefault(number, sentence)
    return sentences


def _order(talk: Talk) -> Iterator[tuple[int, bool]]:
    """Numbers of sentences as they are said, and whether Joe says them."""
    if not talk.levels:
        return
    said: set[tuple[int, bool]] = set()

    def once(number: int, *, by_joe: bool) -> Iterator[tuple[int, bool]]:
        if number in (talk.joe if by_joe else talk.other) and (number, by_joe) not in said:
            said.add((number, by_joe))
            yield number, by_joe

    yield from once(talk.levels[0][0].number, by_joe=False)
    # The levels that are open, each with what is still to be asked: the last is talked about.
    stack = [_leave_last(talk.levels[0][1:])]
    opened = {0}
    while stack:
        if not stack[-1]:
            stack.pop()
            continue
        node = stack[-1].pop(0)
        yield from once(node.number, by_joe=True)
        before = len(said)
        yield from once(node.number, by_joe=False)
        if len(said) == before and node.next > 1:
            yield from once(node.next, by_joe=False)
        for index, level in enumerate(talk.levels):
            leads_here = level[0].number in (node.number, node.next)
            if leads_here and index not in opened and node.number in talk.joe:
                opened.add(index)
                if level[0].next > 0:  # asked again, Joe says this instead
                    stack[-1] = _leave_last([*stack[-1], Node(level[0].next, node.next)])
                stack.append(_leave_last(level[1:]))


def _leave_last(nodes: list[Node]) -> list[Node]:
    """What Joe may say, what ends the conversation last."""
    return sorted(nodes, key=lambda node: node.next == _LEAVE)
