"""Word errors of what a model says against what it writes: a recogniser hears its voice."""

from pathlib import Path

from finetune.annotation.recognise import SAMPLE_RATE as RECOGNISER_RATE
from finetune.annotation.recognise import Recogniser
from finetune.data.audio.read import read_channels
from finetune.errors import DataError
from finetune.evaluation.duplex.layout import OUTPUT_FILE
from finetune.evaluation.duplex.outputs import text_stream_words
from finetune.evaluation.out_folder import unwritable
from finetune.evaluation.word_errors import WordErrors, count_errors
from finetune.files import hash_file, read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing


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
