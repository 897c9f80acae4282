"""How English numbers are read aloud: every way that is usual, since a transcript does not say which.

A reading is a list of lower-case words; a number has several.
"""

Reading = list[str]

_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = (
    "zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
MAX_CARDINAL_DIGITS = 15  # below a quadrillion; longer ones are read digit by digit


def readings_of_digits(digits: str) -> list[Reading]:
    """Read a row of digits: as a number, in pairs as a year or a room is, and digit by digit.

    Args:
        digits: ASCII digits, at least one.

    Returns:
        Readings without repetition.
    """
    readings = []
    if digits[0] != "0" and len(digits) <= MAX_CARDINAL_DIGITS:
        readings += readings_of_cardinal(int(digits))
        readings += _in_pairs(digits)
    readings += [[_digit(digit, zero) for digit in digits] for zero in ("zero", "oh")]
    return _distinct(readings)


def readings_of_cardinal(number: int) -> list[Reading]:
    """Read a number below 10**15 as a quantity, without and with the British "and"."""
    return _distinct([_cardinal(number, link) for link in ([], ["and"])])


def readings_of_decimal(whole: int, fraction: str) -> list[Reading]:
    """Read a number with a decimal point; `fraction` holds the digits after it."""
    return [
        [*whole_reading, "point", *(_digit(digit, zero) for digit in fraction)]
        for whole_reading in readings_of_cardinal(whole)
        for zero in ("zero", "oh")
    ]


def readings_of_ordinal(number: int) -> list[Reading]:
    """Read "23rd" and the like."""
    return [[*reading[:-1], _ordinal(reading[-1])] for reading in readings_of_cardinal(number)]


def readings_of_plural(digits: str) -> list[Reading]:
    """Read "1990s" and the like."""
    return [[*reading[:-1], _plural(reading[-1])] for reading in readings_of_digits(digits)]


def readings_of_time(hour: int, minute: int) -> list[Reading]:
    """Read a time of day such as 7:30."""
    hours = _cardinal(hour, [])
    if minute == 0:
        return [[*hours, "o'clock"], hours, [*hours, "hundred"]]
    if minute < 10:
        return [[*hours, zero, _ONES[minute]] for zero in ("oh", "zero")]
    return [[*hours, *_cardinal(minute, [])]]


def _cardinal(number: int, link: list[str]) -> Reading:
    for scale, name in _SCALES:
        if number >= scale:
            head, rest = divmod(number, scale)
            joint = link if 0 < rest < 100 else []
            return [*_cardinal(head, link), name, *joint, *(_cardinal(rest, link) if rest else [])]
    if number >= 100:
        head, rest = divmod(number, 100)
        return [_ONES[head], "hundred", *(link + _cardinal(rest, link) if rest else [])]
    if number < 20:
        return [_ONES[number]]
    return [_TENS[number // 10], *([_ONES[number % 10]] if number % 10 else [])]


def _in_pairs(digits: str) -> list[Reading]:
    """1984 as nineteen eighty-four, 305 as three oh five; nothing for other lengths."""
    if len(digits) not in (3, 4):
        return []
    head, rest = int(digits[:-2]), int(digits[-2:])
    if rest == 0:
        return [[*_cardinal(head, []), "hundred"]] if head % 10 else []
    if rest < 10:
        return [[*_cardinal(head, []), zero, _ONES[rest]] for zero in ("oh", "zero")]
    return [[*_cardinal(head, []), *_cardinal(rest, [])]]


def _digit(digit: str, zero: str) -> str:
    return zero if digit == "0" else _ONES[int(digit)]


def _ordinal(word: str) -> str:
    if word in _ORDINALS:
        return _ORDINALS[word]
    return word[:-1] + "ieth" if word.endswith("y") else word + "th"


def _plural(word: str) -> str:
    if word.endswith("y"):
        return word[:-1] + "ies"
    return word + ("es" if word in ("six", "zero") else "s")


def _distinct(readings: list[Reading]) -> list[Reading]:
    return [list(reading) for reading in dict.fromkeys(map(tuple, readings))]
