"""From a sentence of Flight of the Amazon Queen to its recordings.

A sentence holds commands for gestures, `*` and two characters or `*XY00(237,112)`. Each part before and after
them has a recording of its own: the sentence's name and the number of the part. As ScummVM's talk.cpp plays
them.
"""

import re
from collections.abc import Iterator

from finetune.demo.human_dialogues.material import Line
from finetune.demo.human_dialogues.queen_archive import Archive

_COMMAND = re.compile(r"\*(?:XY.{11}|.{0,2})")
_NOTE = re.compile(r"<[^>]*>|\([^)]*\)|\^_")  # of a sound, such as (sigh), and the sign of a trademark
_SILENT = re.compile(r"[*0#\s]*")  # nothing, or the mark for it


def sentence_lines(archive: Archive, prefix: str, sentence: str, *, by_first: bool) -> Iterator[Line]:
    """Yield the recorded parts of a sentence.

    Args:
        archive: with the recordings.
        prefix: name of the sentence's recordings, without the part's number.
        sentence: as the script has it.
        by_first: whether the first speaker says it.
    """
    if _SILENT.fullmatch(sentence):
        return
    for index, part in enumerate(_COMMAND.split(sentence)):
        text = " ".join(_NOTE.sub("", part).split())
        name = f"{prefix}{index + 1:X}.SB"
        if name in archive and any(char.isalnum() for char in text):
            yield Line(name, by_first, text, archive.read(name), archive.sound_format)
