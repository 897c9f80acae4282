"""Debian's recorded telephone prompts: a human voice with transcripts, aligned word by word.

The packages `asterisk-core-sounds-en-g722` and `asterisk-core-sounds-en`, CC-BY-SA 3.0.
"""

import gzip
import re
from pathlib import Path
from typing import NamedTuple

import soxr

from finetune.annotation.aligner import SAMPLE_RATE as ALIGNER_RATE
from finetune.annotation.aligner import Aligner
from finetune.demo.debian.fetch import find_package
from finetune.demo.debian.package import read_package
from finetune.demo.speech import word_times as speech
from finetune.demo.speech.decode import decode_sound
from finetune.demo.speech.word_times import Speech
from finetune.errors import UserError

SOUNDS_PACKAGE = "asterisk-core-sounds-en-g722"
TEXTS_PACKAGE = "asterisk-core-sounds-en"

_LISTING = "core-sounds-en.txt.gz"
_NOTE = re.compile(r"\[[^]]*\]|<[^>]*>")


class Prompt(NamedTuple):
    """One recorded prompt: its name, what is said, and its file in G.722."""

    name: str
    text: str
    g722: bytes


class Packages(NamedTuple):
    """What the packages hold: prompts in order of their names, and the terms under which they come."""

    prompts: list[Prompt]
    copyright: str


def read_prompts(folder: Path) -> Packages:
    """Read the two packages.

    Prompts without speech (tones, silences) are left out, and so are those whose description says that
    something else is heard, too.

    Args:
        folder: where `apt-get download` put them.

    Raises:
        UserError: one is missing, damaged or does not hold what is expected.
    """
    sounds = dict(read_package(_find(folder, SOUNDS_PACKAGE)))
    texts = dict(read_package(_find(folder, TEXTS_PACKAGE)))
    listings = [content for name, content in texts.items() if Path(name).name == _LISTING]
    terms = [content for name, content in sounds.items() if Path(name).name == "copyright"]
    if not listings or not terms:
        raise UserError(
            f"{folder}: the packages hold no {_LISTING} or no copyright file; take other versions."
        )
    spoken = _transcripts(gzip.decompress(listings[0]).decode("utf-8"))
    recorded = {_prompt_name(name): data for name, data in sounds.items() if name.endswith(".g722")}
    prompts = [Prompt(name, spoken[name], recorded[name]) for name in sorted(spoken.keys() & recorded.keys())]
    if not prompts:
        raise UserError(f"{folder}: no prompt of {SOUNDS_PACKAGE} is described in {TEXTS_PACKAGE}.")
    return Packages(prompts, terms[0].decode("utf-8"))


def align_prompt(prompt: Prompt, aligner: Aligner) -> Speech:
    """Decode a prompt, find its words and bring it to the sample rate of the demo.

    Raises:
        DataError: it cannot be decoded, or the transcript does not match.
    """
    samples, _ = decode_sound(prompt.g722, file_format="g722")
    words = aligner.align(samples, prompt.text).words
    return Speech(soxr.resample(samples, ALIGNER_RATE, speech.SAMPLE_RATE), words)


def _find(folder: Path, package: str) -> Path:
    found = find_package(folder, package)
    if found is None:
        raise UserError(
            f"{folder}: holds no {package}_*.deb; there: apt-get download {SOUNDS_PACKAGE} {TEXTS_PACKAGE}"
        )
    return found


def _transcripts(listing: str) -> dict[str, str]:
    """What is said by prompt, from lines such as `vm-goodbye: Goodbye!`."""
    texts = {}
    for line in listing.splitlines():
        name, colon, text = line.partition(":")
        if not colon or line.startswith(";"):
            continue
        if "(" in text:
            continue  # tells what else is heard
        text = " ".join(_NOTE.sub(" ", text).split())
        if text:
            texts[name.strip()] = text
    return texts


def _prompt_name(path: str) -> str:
    """`letters/at` for `usr/share/asterisk/sounds/en_US_f_Allison/letters/at.g722`."""
    return path.partition("/sounds/")[2].partition("/")[2].removesuffix(".g722")
