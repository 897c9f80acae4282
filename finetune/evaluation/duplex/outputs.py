"""What models answered: files beside each other, by set and sample, found or made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import sphn
import torch
from moshi.models.loaders import SAMPLE_RATE

from finetune.data.audio.read import read_channels, read_voice
from finetune.errors import ConfigError, DataError
from finetune.evaluation.duplex.figures import Annotation
from finetune.evaluation.duplex.layout import INPUT_FILE, OUTPUT_FILE, WORDS_FILE, Sample, read_words
from finetune.evaluation.duplex.speech import (
    HANGOVER_FRAMES,
    THRESHOLD_DB,
    ModelSpeech,
    speech_from_sound,
    speech_from_words,
)
from finetune.evaluation.duplex.talk import Answer, Talker
from finetune.evaluation.out_folder import unwritable
from finetune.files import hash_file, read_json_object, write_json
from moshi_ttt.files.atomic_file import replacing

SpeechSource = Literal["energy", "words"]
SPEECH_SOURCES = get_args(SpeechSource)
TEXT_STREAM = "text stream"
_ORIGIN = "moshi_ttt"  # key of `output.json`, where it comes from; the benchmark's scripts pass it over
_TOLERANCE_SEC = 0.1  # the outputs of some systems are a frame shorter than the input


@dataclass(frozen=True)
class SpeechSettings:
    """How the model's speech is found.

    Attributes:
        source: `energy`, of the sound; or `words`, by the times of the words in `output.json`.
        threshold_db: of the energy, in dB of full scale.
        hangover_frames: of 80 ms; shorter silences are part of the speech.
    """

    source: SpeechSource = "energy"
    threshold_db: float = THRESHOLD_DB
    hangover_frames: int = HANGOVER_FRAMES


def output_folder(sample: Sample, root: Path, *, is_only_set: bool) -> Path:
    """Where the output of a sample lies below a folder: by set and id, or of the only set by id alone."""
    by_set = root / sample.place
    return root / sample.folder.name if is_only_set and not by_set.parent.is_dir() else by_set


def make_output(talker: Talker, sample: Sample, folder: Path) -> bool:
    """Let a model answer a sample, unless its answer to this very recording is there and whole.

    Returns:
        Whether it was made now.

    Raises:
        DataError: the recording cannot be read.
        ConfigError: the answer cannot be written.
    """
    path = sample.folder / INPUT_FILE
    user = torch.from_numpy(read_voice(path, sample_rate=SAMPLE_RATE))
    if len(user) == 0:
        raise DataError(f"{path}: holds no sound.")
    heard = _digest(path)
    if _is_whole(folder, heard):
        return False
    answer = talker.answer(user)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, answer, heard)
    except OSError as error:
        raise unwritable(folder, error) from None
    return True


def read_speech(folder: Path, settings: SpeechSettings) -> ModelSpeech:
    """When a model spoke, by its output.

    Raises:
        DataError: a file is missing or damaged.
    """
    samples = _read_output(folder)
    if settings.source == "energy":
        return speech_from_sound(
            samples,
            sample_rate=SAMPLE_RATE,
            threshold_db=settings.threshold_db,
            hangover_frames=settings.hangover_frames,
        )
    return speech_from_words(
        read_words(folder / WORDS_FILE),
        duration_sec=len(samples) / SAMPLE_RATE,
        hangover_frames=settings.hangover_frames,
    )


def check_length(speech: ModelSpeech, annotation: Annotation, *, task: str, name: str) -> None:
    """See that an output reaches what it is judged by.

    Raises:
        DataError: it is shorter, so nothing can be said of it.
    """
    starts_count = task == "smooth_turn_taking"  # the user's turn ends where the event begins
    for start_sec, end_sec in annotation.events:
        needed_sec = start_sec if starts_count else end_sec
        if speech.duration_sec + _TOLERANCE_SEC < needed_sec:
            raise DataError(
                f"{name}: {OUTPUT_FILE} ends at {speech.duration_sec:.2f} s, before what it is judged by at "
                f"{needed_sec:.2f} s."
            )


def text_stream_words(folder: Path) -> list[str]:
    """What the model wrote while it spoke.

    Raises:
        DataError: `output.json` is missing, or its words are not those of the model's text stream.
    """
    path = folder / WORDS_FILE
    origin = read_json_object(path, error=DataError).get(_ORIGIN)
    if not isinstance(origin, dict) or origin.get("source") != TEXT_STREAM:
        raise DataError(
            f"{path}: its words are not those of the model's text stream, so there is no reference."
        )
    return [word.text for word in read_words(path)]


def _read_output(folder: Path) -> np.ndarray:
    """The model's voice, `[num_samples]`: the only channel, or the left one."""
    path = folder / OUTPUT_FILE
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    samples = read_channels(path, sample_rate=SAMPLE_RATE)[0]
    if len(samples) == 0:
        raise DataError(f"{path}: holds no sound.")
    return samples


def _write(folder: Path, answer: Answer, heard: str) -> None:
    with replacing(folder / OUTPUT_FILE) as partial:
        sphn.write_wav(str(partial), answer.audio.numpy().clip(-1, 1), SAMPLE_RATE)
    content: dict[str, Any] = {
        "text": " ".join(word.text for word in answer.words),
        "chunks": [
            {"text": word.text, "timestamp": [round(word.start_sec, 3), round(word.end_sec, 3)]}
            for word in answer.words
        ],
        _ORIGIN: {
            "source": TEXT_STREAM,
            "input_sha256": heard,
            "output_sha256": hash_file(folder / OUTPUT_FILE),
            "memory_resets": answer.memory_resets,
        },
    }
    with replacing(folder / WORDS_FILE) as partial:
        write_json(partial, content)


def _is_whole(folder: Path, heard: str) -> bool:
    """Whether an answer to a recording with this hash is there, and its sound is what was written."""
    try:
        origin = read_json_object(folder / WORDS_FILE, error=ConfigError).get(_ORIGIN, {})
        said = hash_file(folder / OUTPUT_FILE)
    except (ConfigError, OSError):
        return False
    known = {"source": TEXT_STREAM, "input_sha256": heard, "output_sha256": said}
    return isinstance(origin, dict) and known.items() <= origin.items()


def _digest(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
