"""Word errors of what a model says against what it writes: a recogniser hears its voice."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune.annotation.recognise import SAMPLE_RATE as RECOGNISER_RATE
from finetune.annotation.recognise import Recogniser
from finetune.annotation.spoken_form import spoken_parts
from finetune.data.audio.read import read_channels
from finetune.errors import DataError, UserError
from finetune.evaluation.duplex.layout import OUTPUT_FILE
from finetune.evaluation.duplex.outputs import text_stream_words
from finetune.evaluation.out_folder import unwritable
from finetune.files import hash_file, read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing

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


class WordErrorMeter:
    """Counts the word errors of outputs; what was heard is kept in a folder, and heard once.

    Args:
        recogniser: what hears.
        folder: of the transcripts, of this recogniser alone.
    """

    def __init__(self, recogniser: Recogniser, folder: Path) -> None:
        self._recogniser = recogniser
        self._folder = folder

    def count(self, output: Path, *, name: str) -> WordErrors:
        """The word errors of the output in a folder.

        Args:
            output: with `output.wav` and the `output.json` of its text stream.
            name: of the sample, a relative path.

        Raises:
            DataError: a file is missing or damaged, or the recogniser fails.
            ConfigError: the transcript cannot be kept.
        """
        text = " ".join(text_stream_words(output))
        return count_errors(text, self._heard(output / OUTPUT_FILE, self._folder / f"{name}.json"))

    def _heard(self, audio: Path, kept: Path) -> str:
        digest = hash_file(audio)
        if kept.is_file():
            try:
                earlier = read_json_object(kept, error=DataError)
            except DataError:
                earlier = {}
            if earlier.get("output_sha256") == digest and isinstance(earlier.get("text"), str):
                return earlier["text"]
        samples = read_channels(audio, sample_rate=RECOGNISER_RATE)[0]
        text = " ".join(word.text for word in self._recogniser.transcribe(samples))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as partial:
                write_json(partial, {"output_sha256": digest, "text": text})
        except OSError as error:
            raise unwritable(kept, error) from None
        return text


def import_jiwer() -> ModuleType:
    """What counts word errors.

    Raises:
        UserError: it is not installed.
    """
    try:
        import jiwer
    except ImportError:
        raise UserError("--wer: jiwer is not installed: pip install 'moshi-ttt[wer]'.") from None
    return jiwer
