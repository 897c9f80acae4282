"""Debian's recorded telephone prompts: a human voice in each of five languages, with transcripts.

The packages `asterisk-core-sounds-<language>-g722` and `asterisk-core-sounds-<language>`. English is aligned
word by word; word times of the others are estimated.
"""

import gzip
import re
from pathlib import Path
from typing import NamedTuple

import soxr

from finetune.annotation.aligner import SAMPLE_RATE as ALIGNER_RATE
from finetune.annotation.aligner import Aligner
from finetune.data.audio.voiced import estimate_words, find_voice
from finetune.demo.debian.fetch import find_package
from finetune.demo.debian.package import read_package
from finetune.demo.speech import word_times as speech
from finetune.demo.speech.decode import decode_sound
from finetune.demo.speech.word_times import Speech
from finetune.errors import UserError

# Language and terms.
LANGUAGES = {
    "en": "CC-BY-SA 3.0",
    "es": "CC-BY-SA 3.0",
    "fr": "CC-BY-SA 3.0",
    "it": "CC-BY 3.0",
    "ru": "CC-BY 3.0",
}
ALIGNED = "en"  # what PocketSphinx knows
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


def prompt_packages(language: str) -> tuple[str, str]:
    """The names of the packages with sounds and texts."""
    return f"asterisk-core-sounds-{language}-g722", f"asterisk-core-sounds-{language}"


def read_prompts(folder: Path, language: str = ALIGNED) -> Packages:
    """Read the two packages of a language.

    Prompts without speech (tones, silences) are left out, and so are those whose description says that
    something else is heard, too.

    Args:
        folder: where `apt-get download` put them.
        language: one of `LANGUAGES`.

    Raises:
        UserError: one is missing, damaged or does not hold what is expected.
    """
    names = prompt_packages(language)
    listing = f"core-sounds-{language}.txt.gz"
    sounds, texts = (dict(read_package(_find(folder, name, names))) for name in names)
    listings = [content for name, content in texts.items() if Path(name).name == listing]
    terms = [content for name, content in sounds.items() if Path(name).name == "copyright"]
    if not listings or not terms:
        raise UserError(
            f"{folder}: the packages hold no {listing} or no copyright file; take other versions."
        )
    spoken = _transcripts(gzip.decompress(listings[0]).decode("utf-8-sig"))
    recorded = {_prompt_name(name): data for name, data in sounds.items() if name.endswith(".g722")}
    prompts = [Prompt(name, spoken[name], recorded[name]) for name in sorted(spoken.keys() & recorded.keys())]
    if not prompts:
        raise UserError(f"{folder}: no prompt of {names[0]} is described in {names[1]}.")
    return Packages(prompts, terms[0].decode("utf-8"))


def align_prompt(prompt: Prompt, aligner: Aligner | None) -> Speech:
    """Decode a prompt, find its words and bring it to the sample rate of the demo.

    Args:
        prompt: what is said.
        aligner: None: the times of the words are estimated.

    Raises:
        DataError: it cannot be decoded, or the transcript does not match.
    """
    samples, rate = decode_sound(prompt.g722, file_format="g722")
    if aligner is not None:
        words = aligner.align(samples, prompt.text).words
    else:
        words = estimate_words(prompt.text, find_voice(samples, sample_rate=rate))
    return Speech(soxr.resample(samples, ALIGNER_RATE, speech.SAMPLE_RATE), words)


def _find(folder: Path, package: str, packages: tuple[str, str]) -> Path:
    found = find_package(folder, package)
    if found is None:
        raise UserError(f"{folder}: holds no {package}_*.deb; there: apt-get download {' '.join(packages)}")
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
