"""From written English words to what is said: tokens of lower-case letters, with every usual reading."""

import re
import unicodedata

from finetune.annotation.numbers import (
    MAX_CARDINAL_DIGITS,
    Reading,
    readings_of_cardinal,
    readings_of_decimal,
    readings_of_digits,
    readings_of_ordinal,
    readings_of_plural,
    readings_of_time,
)
from finetune.errors import DataError

_PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "ʼ": "'", "–": "-", "—": "-", "…": ".", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o"}
)
_SILENT = frozenset(".,;:!?\"'()-/“”„«»*_~¿¡")
_SYMBOLS = {
    "%": ["percent"], "&": ["and"], "+": ["plus"], "=": ["equals"], "@": ["at"],
}  # fmt: skip
_HASH = [["pound"], ["hash"], ["number"]]
_UNITS = {
    "$": ("dollar", "dollars", "cents"),
    "£": ("pound", "pounds", "pence"),
    "€": ("euro", "euros", "cents"),
}
_MAX_ACRONYM_LETTERS = 5
_AMOUNT = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_TOKEN = re.compile(
    rf"(?P<money>[$£€]{_AMOUNT}(?:\.\d\d)?(?!\d))"
    r"|(?P<time>(?<!\d)\d{1,2}:[0-5]\d(?!\d))"
    rf"|(?P<ordinal>{_AMOUNT}(?:st|nd|rd|th)(?![a-z]))"
    r"|(?P<plural>\d+'?s(?![a-z]))"
    rf"|(?P<decimal>{_AMOUNT}\.\d+)"
    r"|(?P<grouped>\d{1,3}(?:,\d{3})+(?!\d))"
    r"|(?P<digits>\d+)"
    r"|(?P<word>'?[a-z]+(?:'[a-z]+)*'?)"
    r"|(?P<symbol>[%&+=@#])",
    re.IGNORECASE | re.ASCII,
)


def spoken_parts(word: str) -> list[list[Reading]]:
    """What is said for one written word.

    Args:
        word: without white space, punctuation included: `"twenty-first`, `7:30`, `$5.50,`, `café`.

    Returns:
        The parts that are said after each other, each with its possible readings; a reading is a list of
        words in lower case. Empty where nothing is said, as for a dash.

    Raises:
        DataError: the word holds characters that are not English; one line that names them.
    """
    plain = _without_accents(word.translate(_PLAIN))
    parts, position = [], 0
    for match in _TOKEN.finditer(plain):
        _check_silent(plain[position : match.start()], word)
        position = match.end()
        parts.append(_readings(match.lastgroup, match.group()))
    _check_silent(plain[position:], word)
    return parts


def _without_accents(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def _check_silent(text: str, word: str) -> None:
    strange = sorted(set(text) - _SILENT)
    if not strange:
        return
    shown = "".join(strange)
    if strange[0] in "[]{}<>":
        raise DataError(f"{word!r}: notes in brackets are not spoken; remove them.")
    raise DataError(f"{word!r}: {shown!r} is not English; the aligner knows English only.")


def _readings(kind: str | None, text: str) -> list[Reading]:
    spelled = list(text.lower())
    if kind == "word" and text.isalpha() and text.isupper() and 1 < len(text) <= _MAX_ACRONYM_LETTERS:
        return [[text.lower()], spelled]
    text = text.lower()
    if sum(char.isdigit() for char in text) > MAX_CARDINAL_DIGITS:
        return readings_of_digits("".join(char for char in text if char.isdigit()))
    if kind == "word":
        return [[text]]
    if kind == "symbol":
        return _HASH if text == "#" else [_SYMBOLS[text]]
    if kind == "money":
        return _money(text[0], text[1:])
    if kind == "time":
        hour, minute = text.split(":")
        return readings_of_time(int(hour), int(minute))
    if kind == "plural":
        return readings_of_plural(text.rstrip("'s"))
    digits = text.replace(",", "")
    if kind == "ordinal":
        return readings_of_ordinal(int(digits[:-2]))
    if kind == "decimal":
        whole, fraction = digits.split(".")
        return readings_of_decimal(int(whole), fraction)
    if kind == "grouped":
        return readings_of_cardinal(int(digits))
    return readings_of_digits(digits)


def _money(sign: str, amount: str) -> list[Reading]:
    one, many, small = _UNITS[sign]
    whole, _, fraction = amount.replace(",", "").partition(".")
    unit = one if int(whole) == 1 else many
    bases = [[*reading, unit] for reading in readings_of_cardinal(int(whole))]
    if not fraction or int(fraction) == 0:
        return bases
    rest = readings_of_cardinal(int(fraction))[0]
    endings = (rest, [*rest, small], ["and", *rest, small])
    short = [[*reading, *rest] for reading in readings_of_cardinal(int(whole))]
    return [[*base, *ending] for base in bases for ending in endings] + short
