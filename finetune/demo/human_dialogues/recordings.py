"""Stereo recordings with word times of conversations, and their manifests; what is there already is kept."""

import json
import logging
import random
import wave
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from finetune.annotation.aligner import SAMPLE_RATE as ALIGNER_RATE
from finetune.annotation.aligner import Aligner
from finetune.data.audio.voiced import estimate_words, find_voice, trim
from finetune.data.words import Word, load_alignments
from finetune.demo.human_dialogues.material import Conversation, Line
from finetune.demo.speech.decode import decode_sound
from finetune.demo.speech.dialogues import MAIN, USER, Turn
from finetune.demo.speech.render import write_dialogue
from finetune.demo.speech.word_times import SAMPLE_RATE, Speech
from finetune.errors import DataError
from finetune.files import read_json_object, writing_to

logger = logging.getLogger(__name__)

_GAPS_SEC = (0.2, 1.0)
_SAME_SPEAKER = 0.5  # of a pause, where nobody else speaks after it
_PARTIAL = ".partial.wav"
_SETS = ("train", "eval")
_COUNTS = "word_times"  # key beside the words


class Settings(NamedTuple):
    """How recordings are made.

    Attributes:
        first_is_moshi: whether the first of the two speakers is on the left.
        seed: the same gives the same pauses and the same held-out conversations.
        held_out: share of the conversations that are held out, at least one.
    """

    first_is_moshi: bool
    seed: int
    held_out: float


class Total(NamedTuple):
    """What a set of recordings holds.

    Attributes:
        recordings: how many.
        seconds: their length.
        voice_sec: length of all words, left and right.
        words: how many.
        estimated: words whose times are estimated.
        lines_left_out: lines that cannot be used.
    """

    recordings: int
    seconds: float
    voice_sec: tuple[float, float]
    words: int
    estimated: int
    lines_left_out: int


def write_recordings(
    data_dir: Path, conversations: Sequence[Conversation], settings: Settings, aligner: Aligner | None
) -> dict[str, Total]:
    """Write recordings, word timings and the manifests `train.jsonl` and `eval.jsonl`.

    A recording that is there is kept: it was written whole. A conversation of which only one speaker can be
    heard is left out.

    Args:
        data_dir: is made where it is missing; what it holds is from the same settings.
        conversations: whose names differ; the two sets share none.
        settings: the same give the same files.
        aligner: for English; None: the times of all words are estimated.

    Returns:
        What each set holds.
    """
    held_out = _held_out(conversations, settings)
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in _SETS}
    for split in _SETS:
        (data_dir / split).mkdir(parents=True, exist_ok=True)
    for conversation in tqdm(conversations, desc="Dialogues", unit="dialogue", disable=None, leave=False):
        split = "eval" if conversation.name in held_out else "train"
        path = data_dir / split / f"{conversation.name}.wav"
        if path.exists() or _write(path, conversation, settings, aligner):
            with wave.open(str(path)) as file:
                duration_sec = file.getnframes() / file.getframerate()
            entries[split].append({"path": f"{split}/{path.name}", "duration": duration_sec})
    for split, lines in entries.items():
        manifest = data_dir / f"{split}.jsonl"
        with writing_to(manifest):
            manifest.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    return {split: _total(data_dir, lines) for split, lines in entries.items()}


def _held_out(conversations: Sequence[Conversation], settings: Settings) -> set[str]:
    names = sorted(conversation.name for conversation in conversations)
    count = min(max(1, round(settings.held_out * len(names))), len(names) - 1)
    return set(random.Random(f"{settings.seed}/held out").sample(names, count))


def _write(path: Path, conversation: Conversation, settings: Settings, aligner: Aligner | None) -> bool:
    """Write one recording with its word timings; False: there are no two speakers to be heard."""
    rng = random.Random(f"{settings.seed}/{conversation.name}")
    turns: list[Turn] = []
    speeches: list[Speech] = []
    num_estimated = num_left_out = 0
    for line in conversation.lines:
        gap_sec = rng.uniform(*_GAPS_SEC)
        try:
            speech, is_estimated = _speech(line, aligner)
        except DataError as error:
            logger.warning("left out %s: %s", line.name, error)
            num_left_out += 1
            continue
        speaker = MAIN if line.by_first == settings.first_is_moshi else USER
        if turns and turns[-1].speaker == speaker:
            gap_sec *= _SAME_SPEAKER
        turns.append(Turn(speaker, line.text, gap_sec))
        speeches.append(speech)
        num_estimated += len(speech.words) if is_estimated else 0
    if len({turn.speaker for turn in turns}) < 2:
        logger.warning("left out the dialogue %s: only one voice is heard in it", conversation.name)
        return False
    partial = path.with_name(_PARTIAL)
    with writing_to(path):
        write_dialogue(turns, speeches, partial)
        timings = partial.with_suffix(".json")
        content = read_json_object(timings)
        content[_COUNTS] = {"estimated": num_estimated, "lines_left_out": num_left_out}
        timings.write_text(json.dumps(content), encoding="utf-8")
        timings.rename(path.with_suffix(".json"))
        partial.rename(path)  # last: a recording that is there has its words
    return True


def _speech(line: Line, aligner: Aligner | None) -> tuple[Speech, bool]:
    """A line at 24 kHz, without silence at its ends, and whether the times of its words are estimated.

    Raises:
        DataError: it cannot be decoded, is silent or too short for its text.
    """
    samples, rate = decode_sound(line.sound, file_format=line.file_format)
    voice = find_voice(samples, sample_rate=rate)
    samples, voice = trim(samples, voice, sample_rate=rate)
    words = _align(samples, rate, line.text, aligner)
    is_estimated = words is None
    if words is None:
        words = estimate_words(line.text, voice)
    return Speech(soxr.resample(samples, rate, SAMPLE_RATE), words), is_estimated


def _align(samples: np.ndarray, rate: int, text: str, aligner: Aligner | None) -> list[Word] | None:
    """The words where the text matches the recording; None elsewhere."""
    if aligner is None:
        return None
    try:
        return aligner.align(soxr.resample(samples, rate, ALIGNER_RATE), text).words
    except DataError:
        return None


def _total(data_dir: Path, entries: Sequence[dict[str, Any]]) -> Total:
    voice_sec = {MAIN: 0.0, USER: 0.0}
    counts: Counter[str] = Counter()
    for entry in entries:
        path = (data_dir / entry["path"]).with_suffix(".json")
        for word in load_alignments(path):
            voice_sec[word.speaker] += word.end_sec - word.start_sec
            counts["words"] += 1
        counts.update(read_json_object(path).get(_COUNTS, {}))  # no longer there in a file of somebody else's
    seconds = sum(entry["duration"] for entry in entries)
    return Total(
        recordings=len(entries),
        seconds=seconds,
        voice_sec=(voice_sec[MAIN], voice_sec[USER]),
        words=counts["words"],
        estimated=counts["estimated"],
        lines_left_out=counts["lines_left_out"],
    )
