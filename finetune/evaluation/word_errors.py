"""Word errors of a text against another one."""

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from finetune.annotation.spoken_form import spoken_parts
from finetune.errors import DataError, UserError

_LETTERS = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


@dataclass(frozen=True)
class WordErrors:
    """Words of a recogniser against those of a text, aligned so that as few as possible differ.

    Attributes:
        num_words: of the text.
        substitutions, deletions, insertions: words heard wrongly, not heard, and heard where there are none.
        heard: what the recogniser heard.
    """

    num_words: int
    substitutions: int
    deletions: int
    insertions: int
    heard: str

    @property
    def num_errors(self) -> int:
        """All of them."""
        return self.substitutions + self.deletions + self.insertions

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {**vars(self), "num_errors": self.num_errors}


def normal_words(text: str) -> list[str]:
    """A text as it is said: lower case, without punctuation, numbers as English words where they are some."""
    words = []
    for written in text.replace("’", "'").split():
        try:
            words += [word for readings in spoken_parts(written) for word in readings[0]]
        except DataError:  # what no English word has, such as the letters of another language
            words += _LETTERS.findall(written.lower())
    return words


def count_errors(text: str, heard: str) -> WordErrors:
    """Compare what was heard with a text, both as `normal_words`.

    Raises:
        UserError: jiwer is not installed.
    """
    reference, hypothesis = normal_words(text), normal_words(heard)
    joined = " ".join(hypothesis)
    if not reference:  # which jiwer refuses
        return WordErrors(0, 0, 0, len(hypothesis), joined)
    found = import_jiwer().process_words(" ".join(reference), joined)
    return WordErrors(len(reference), found.substitutions, found.deletions, found.insertions, joined)


def errors_by_word(reference: list[str], hypothesis: list[str]) -> list[int]:
    """How many errors there are at each word of a reference, which has at least one.

    Args:
        reference, hypothesis: words of `normal_words`.

    Returns:
        1 for a word that was heard wrongly or not at all, and 1 for each word that was heard after it, or
        before the first one, where there is none.

    Raises:
        UserError: jiwer is not installed.
    """
    errors = [0] * len(reference)
    (chunks,) = import_jiwer().process_words(" ".join(reference), " ".join(hypothesis)).alignments
    for chunk in chunks:
        if chunk.type == "insert":
            errors[max(0, chunk.ref_start_idx - 1)] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            for index in range(chunk.ref_start_idx, chunk.ref_end_idx):
                errors[index] += 1
    return errors


def import_jiwer() -> ModuleType:
    """What counts word errors.

    Raises:
        UserError: it is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise UserError(
            "word errors are counted by jiwer, which is not installed: pip install 'moshi-ttt[wer]'."
        ) from None
    return jiwer
