"""Damage to files, drawn from a seed: bits, blocks, lengths, JSON values, headers of safetensors files."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What somebody may write where something else is expected.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**6, 10**9, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf"),
    "", "x", "../../x", "/etc/passwd", "hf://a/b/c", "x" * 5000, "\ud800", "1", [], {}, [[]], [0], [-1],
    {"a": 1},
]  # fmt: skip


def mutate(path: Path, draw: random.Random) -> str:
    """Damage a file in place.

    Args:
        path: of the file.
        draw: decides how.

    Returns:
        What was done.
    """
    ways: list[Callable[[bytes, random.Random], bytes]] = [
        _flip,
        _cut,
        _zero,
        _random_block,
        _repeat,
        _replace,
    ]
    weights = [3.0] * len(ways)
    if path.suffix == ".safetensors":
        ways, weights = [*ways, _header], [*weights, 24.0]
    elif path.suffix == ".json":
        ways, weights = [*ways, _values, _text], [*weights, 60.0, 6.0]
    elif path.suffix in (".jsonl", ".yaml"):
        ways, weights = [*ways, _lines, _text], [*weights, 30.0, 10.0]
    way = draw.choices(ways, weights)[0]
    path.write_bytes(way(path.read_bytes(), draw))
    return way.__name__.strip("_")


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 8, 200])):
        # Where formats say what they are, more often than elsewhere.
        place = draw.randrange(min(len(changed), draw.choice([16, 256, len(changed)])))
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, 7, 8, 44, len(content) // 2, len(content) - 1])]


def _zero(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    length = draw.choice([4, 64, 4096])
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def _random_block(content: bytes, draw: random.Random) -> bytes:
    start = draw.choice([0, draw.randrange(len(content))])
    return content[:start] + draw.randbytes(draw.choice([4, 64, 4096])) + content[start:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start : start + 5000] * 3 + content[start:]


def _replace(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"RIFF", b"OggS", b"fLaC", draw.randbytes(5000)]
    )


def _values(content: bytes, draw: random.Random) -> bytes:
    tree = json.loads(content)
    for _ in range(draw.choice([1, 1, 1, 3])):
        tree = _change(tree, draw)
    return json.dumps(tree).encode()


def _lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    place = draw.randrange(len(lines))
    try:
        lines[place] = _values(lines[place], draw)
    except ValueError:  # YAML: a key gets another value
        key = lines[place].partition(b":")[0]
        lines[place] = key + b": " + json.dumps(draw.choice(VALUES)).encode()
    return b"\n".join(lines)


def _text(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        [
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xef\xbb\xbf" + content,
            content.decode(errors="replace").encode("utf-16"),
            content + content,
            content.replace(b"1", b"1" * 5000, 1),
            content.replace(b'"', b"'"),
            b"&a [*a]",
            b"x" * 2_000_000,
        ]
    )


def _header(content: bytes, draw: random.Random) -> bytes:
    """Change what the header of a safetensors file says, or its length."""
    (size,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.15:
        return (
            struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**20, 2**63, 2**64 - 1])) + content[8:]
        )
    header = json.loads(content[8 : 8 + size])
    entries = [name for name in header if name != "__metadata__"]
    choice = draw.random()
    if choice < 0.35 and "__metadata__" in header:
        key = draw.choice(list(header["__metadata__"]))
        try:
            inner = json.loads(header["__metadata__"][key])
            header["__metadata__"][key] = json.dumps(_change(inner, draw))
        except ValueError:
            header["__metadata__"][key] = str(draw.choice(VALUES))
    elif choice < 0.5:
        first, second = draw.choice(entries), draw.choice(entries)
        header[first], header[second] = header[second], header[first]
    elif choice < 0.6:
        header[draw.choice(["a.b.c", draw.choice(entries) + ".x"])] = header.pop(draw.choice(entries))
    elif choice < 0.75:
        header[draw.choice(entries)]["dtype"] = draw.choice(
            ["F64", "F16", "BF16", "I8", "BOOL", "U64", "F8_E4M3"]
        )
    else:
        name = draw.choice(entries)
        header[name] = _change(header[name], draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _change(tree: Any, draw: random.Random) -> Any:
    """A JSON value with one place in it changed: replaced, removed, added to, or nested too deep."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        choice = draw.random()
        if choice < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if choice < 0.15:
            return tree | {draw.choice(["gizmo", "", "ttt", "files", "quantize"]): draw.choice(VALUES)}
        return tree | {key: _change(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.8:
        place = draw.randrange(len(tree))
        choice = draw.random()
        if choice < 0.15:
            return tree[:place] + tree[place + 1 :]
        if choice < 0.3:
            return tree * draw.choice([2, 50])
        return [*tree[:place], _change(tree[place], draw), *tree[place + 1 :]]
    return draw.choice(VALUES)
