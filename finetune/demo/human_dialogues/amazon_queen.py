"""Flight of the Amazon Queen: an adventure game of 1995 with English voices; Joe speaks in every dialogue.

The package `flight-of-the-amazon-queen`. Copyright John Passfield and Steve Stamatiadis, who let it be given
away and modified with its readme and all notices; it must not be sold by itself.
"""

import gzip
import re
import struct
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from finetune.demo.debian.package import read_package
from finetune.demo.human_dialogues.material import Conversation, Material
from finetune.demo.human_dialogues.queen_archive import Archive
from finetune.demo.human_dialogues.queen_scenes import find_persons, scene_lines
from finetune.demo.human_dialogues.queen_talk import talk_lines
from finetune.errors import UserError

PACKAGE = "flight-of-the-amazon-queen"

_CONTAINER = "queen.1c"
_OBJECTS = "QUEEN.JAS"
_VOICE = re.compile(r"(\d\d(SSSS|XXXX|[0-9A-F]{4})[JP]|C....\d\d|JOE\d{4})[0-9A-F]\.SB")


def read_amazon_queen(paths: Sequence[Path]) -> Material:
    """Read the package.

    Args:
        paths: the package alone.

    Raises:
        UserError: it is damaged or does not hold what is expected.
    """
    (path,) = paths
    files = {PurePosixPath(name).name: content for name, content in read_package(path)}
    if _CONTAINER not in files or "readme.txt.gz" not in files or "copyright" not in files:
        raise UserError(f"{path}: holds no {_CONTAINER} with its notices; take another version.")
    notices = {
        "copyright": files["copyright"].decode("utf-8", errors="replace"),
        "readme.txt": gzip.decompress(files["readme.txt.gz"]).decode("latin-1"),
    }
    archive = Archive(files[_CONTAINER], where=f"{path}: {_CONTAINER}")
    try:
        persons = find_persons(archive.read_script(_OBJECTS))
    except struct.error as error:
        raise archive.damaged(f"{_OBJECTS}: {error}") from error
    conversations = []
    for name in archive.names:
        kind = PurePosixPath(name).suffix
        if kind == ".DOG":
            lines = talk_lines(archive, name)
        elif kind == ".CUT":
            lines = scene_lines(archive, name, persons) or []
        else:
            continue
        if lines:
            conversations.append(
                Conversation(f"{kind[1:].lower()}_{PurePosixPath(name).stem.lower()}", lines)
            )
    if not conversations:
        raise UserError(f"{path}: no dialogue is found in {_CONTAINER}.")
    used = {line.name for conversation in conversations for line in conversation.lines}
    voices = sum(_VOICE.fullmatch(name) is not None for name in archive.names)
    return Material(
        sorted(conversations),
        ("Joe", "whom he talks to"),
        True,
        {"of monologues and of scenes of others": voices - len(used)},
        notices,
    )
