"""A guess at the pronunciation of an English word that no dictionary has, in ARPABET."""

import re

_LONG_VOWELS = {"a": "EY", "e": "IY", "i": "AY", "o": "OW", "u": "UW"}
# Tried in this order at each letter; the first that fits is taken.
_RULES = tuple(
    (re.compile(pattern), phones.split())
    for pattern, phones in (
        (r"tion(?=s?$)", "SH AH N"), (r"sion(?=s?$)", "ZH AH N"), (r"ture(?=s?$)", "CH ER"),
        (r"eigh", "EY"), (r"augh", "AO"), (r"ough", "AO"), (r"igh", "AY"), (r"tch", "CH"), (r"sch", "S K"),
        (r"dge", "JH"), (r"^kn", "N"), (r"^wr", "R"), (r"^ps", "S"), (r"^x", "Z"), (r"^y", "Y"),
        (r"ck", "K"), (r"ch", "CH"), (r"sh", "SH"), (r"th", "TH"), (r"ph", "F"), (r"wh", "W"),
        (r"qu", "K W"), (r"ng", "NG"), (r"gh", "G"), (r"ee", "IY"), (r"ea", "IY"), (r"oo", "UW"),
        (r"ou", "AW"), (r"ow", "OW"), (r"o[iy]", "OY"), (r"a[iy]", "EY"), (r"a[uw]", "AO"),
        (r"e[uw]", "UW"), (r"ie", "IY"), (r"ei", "EY"), (r"ey", "IY"), (r"o[ae]", "OW"), (r"u[ei]", "UW"),
        (r"ar", "AA R"), (r"(?<=[bcdgptv])re(?=s?$)", "ER"), (r"[eiu]r(?![aeiou])", "ER"), (r"or", "AO R"),
        (r"(?<=[sxz])es$", "IH Z"), (r"(?<=[^aeiou])le(?=s?$)", "AH L"), (r"(?<=.)e(?=s?$)", ""),
        (r"c(?=[eiy])", "S"), (r"g(?=[eiy])", "JH"), (r"a$", "AH"), (r"o(?=s?$)", "OW"), (r"i$", "IY"),
        (r"y$", "IY"), (r"y", "IH"), (r"bb?", "B"), (r"cc?", "K"), (r"dd?", "D"), (r"ff?", "F"),
        (r"gg?", "G"), (r"hh?", "HH"), (r"jj?", "JH"), (r"kk?", "K"), (r"ll?", "L"), (r"mm?", "M"),
        (r"nn?", "N"), (r"pp?", "P"), (r"q+", "K"), (r"rr?", "R"), (r"ss?", "S"), (r"tt?", "T"),
        (r"vv?", "V"), (r"ww?", "W"), (r"xx?", "K S"), (r"zz?", "Z"), (r"a", "AE"), (r"e", "EH"),
        (r"i", "IH"), (r"o", "AA"), (r"u", "AH"),
    )
)  # fmt: skip
_MAGIC_E = re.compile(r"[aeiou](?=[bcdfgklmnpstvz]es?$)")


def guess_phones(word: str) -> list[str]:
    """Apply rules of English spelling.

    Args:
        word: letters a to z in lower case; apostrophes are passed over.

    Returns:
        ARPABET phones without stress, at least one: rough, but near enough for an alignment.
    """
    letters = word.replace("'", "")
    phones: list[str] = []
    position = 0
    while position < len(letters):
        if _MAGIC_E.match(letters, position):
            phones.append(_LONG_VOWELS[letters[position]])
            position += 1
            continue
        end, found = _first_rule(letters, position)
        phones += found
        position = end
    return phones or ["AH"]


def _first_rule(letters: str, position: int) -> tuple[int, list[str]]:
    for pattern, phones in _RULES:
        match = pattern.match(letters, position)
        # `^` matches at the start only, whatever the position, and so does a look behind.
        if match is not None:
            return match.end(), phones
    raise AssertionError(f"no rule for {letters[position]!r}")
