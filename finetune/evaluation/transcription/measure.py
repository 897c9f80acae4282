"""What a model writes of recordings whose words are known, and where it is wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.models.loaders import FRAME_RATE, SAMPLE_RATE

from finetune.data.args import TextOptions
from finetune.data.audio.read import read_channels
from finetune.data.batches.interleaver import text_words
from finetune.data.words import Word, alignment_entries, load_alignments
from finetune.errors import DataError
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.long_context.arms import Arm, enter_arm
from finetune.evaluation.sources import Source
from finetune.evaluation.word_errors import errors_by_word, normal_words
from finetune.files import hash_file, read_json_object, write_json
from finetune.inference.conversation import Conversation, Sampling
from finetune.inference.speech_model import SpeechModel
from finetune.inference.transcription import Transcriber
from moshi_ttt.files.atomic_file import replacing


@dataclass(frozen=True)
class Transcript:
    """A recording's words beside what a model wrote.

    Attributes:
        name: of the recording.
        seconds: when each word of the reference starts, `[W]`, W >= 1.
        errors: how many there are at each of them, `[W]`, see `errors_by_word`.
    """

    name: str
    seconds: np.ndarray
    errors: np.ndarray


def compare(name: str, reference: Sequence[Word], written: Sequence[Word]) -> Transcript:
    """Hold what was written against the words of a recording.

    Raises:
        DataError: the reference holds no word.
    """
    words, seconds = [], []
    for word in reference:
        normal = normal_words(word.text)
        words += normal
        seconds += [word.start_sec] * len(normal)
    if not words:
        raise DataError(f"{name}: its words are none that could be heard wrongly.")
    heard = [each for word in written for each in normal_words(word.text)]
    return Transcript(name, np.array(seconds), np.array(errors_by_word(words, heard)))


@contextmanager
def transcribing(speech: SpeechModel) -> Iterator[Callable[[Path], list[Word]]]:
    """What writes down a recording, greedily, each from a fresh start."""
    with Conversation(
        speech.lm, speech.mimi, sampling=Sampling(greedy=True), conditions=speech.conditions
    ) as conversation:

        def write(path: Path) -> list[Word]:
            conversation.start()
            audio = torch.from_numpy(read_channels(path, sample_rate=SAMPLE_RATE)[0])
            return Transcriber(speech, conversation).write(audio)[0]

        yield write


def reference_words(source: Source, placing: TextOptions) -> list[Word]:
    """The words of a recording that become text.

    Raises:
        DataError: there are none, or their file cannot be used.
    """
    words = text_words(load_alignments(source.alignment_path), placing)
    if not words:
        raise DataError(f"{source.alignment_path}: holds no words to compare with.")
    return words


def written_words(
    source: Source, arm: Arm, speech: SpeechModel, write: Callable[[Path], list[Word]], kept: Path
) -> list[Word]:
    """What a model writes of a recording in an arm; kept in a file, and written once.

    Raises:
        DataError: the recording cannot be used.
    """
    try:
        digest = hash_file(source.path)
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read: {error.strerror or error}.") from None
    if kept.is_file() and read_json_object(kept, error=DataError).get("audio_sha256") == digest:
        return load_alignments(kept)
    enter_arm(speech.lm, arm)
    words = write(source.path)
    with replacing(kept) as partial:
        write_json(partial, {"audio_sha256": digest, "alignments": alignment_entries(words)})
    return words


def error_rates(
    transcripts: Sequence[Transcript], *, bin_frames: int, bootstrap: RatioBootstrap
) -> dict[str, Any]:
    """The word error rate over all, and by when a word is said.

    Args:
        transcripts: at least one.
        bin_frames: length of a bin, frames.
        bootstrap: over recordings.

    Returns:
        `all`, and `bins` in order, each with `start_frame`, `words`, `errors`, `wer` and its `interval`,
        which is null where fewer than two recordings have words there.
    """
    frames = [transcript.seconds * FRAME_RATE for transcript in transcripts]
    last = int(max(each.max() for each in frames))
    bins = []
    for start in range(0, last + 1, bin_frames):
        inside = [(start <= each) & (each < start + bin_frames) for each in frames]
        bins.append({"start_frame": start, **_rate(transcripts, inside, bootstrap)})
    everything = [np.ones(len(each), bool) for each in frames]
    return {"all": _rate(transcripts, everything, bootstrap), "bins": bins}


def _rate(
    transcripts: Sequence[Transcript], inside: Sequence[np.ndarray], bootstrap: RatioBootstrap
) -> dict[str, Any]:
    pairs = [pair for pair in zip(transcripts, inside, strict=True) if pair[1].any()]
    errors = np.array([transcript.errors[part].sum() for transcript, part in pairs], float)
    words = np.array([part.sum() for _, part in pairs], float)
    return {
        "words": int(words.sum()),
        "errors": int(errors.sum()),
        "wer": float(errors.sum() / words.sum()) if pairs else None,
        "interval": bootstrap.interval(errors, words),
    }
