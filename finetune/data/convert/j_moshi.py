"""The layout of J-Moshi's fine-tuning: `audio/NAME.wav`, A left and B right, and `text/NAME.json`.

The json lists the words of both: `[{"speaker": "A", "word": "hello", "start": 0.46, "end": 1.52}, ...]`
(https://github.com/nu-dialogue/moshi-finetune).
"""

import json
from pathlib import Path
from typing import Any

from finetune.data.audio.find import AUDIO_SUFFIXES
from finetune.data.convert.source import Source, SourceFault, SourceRecording, Track, number, text
from finetune.data.words import SPEAKERS, Word
from finetune.errors import DataError
from moshi_ttt.files.regular_file import read_text

SIDES = ("A", "B")  # left and right


def read_j_moshi(source: Path, *, moshi: str = "A") -> Source:
    """Yield the dialogues of a folder, sorted by name.

    Args:
        source: with the folders `audio` and `text`, or with both kinds of files in itself.
        moshi: which speaker becomes Moshi, `A` or `B`.

    Raises:
        DataError: there is no such folder, or no json in it.
    """
    if not source.is_dir():
        raise DataError(f"{source}: is no folder; name the one that holds audio/ and text/.")
    apart = (source / "audio").is_dir() and (source / "text").is_dir()
    audio, timings = (source / "audio", source / "text") if apart else (source, source)
    found: dict[str, list[Path]] = {}
    for path in sorted(audio.iterdir()):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    files = sorted(path for path in timings.glob("*.json") if not path.name.startswith("."))
    if not files:
        raise DataError(f"{timings}: holds no .json file with words; name the folder with audio/ and text/.")
    for path in files:
        try:
            yield _dialogue(path, found.pop(path.stem, []), audio=audio, moshi=moshi)
        except DataError as error:
            yield SourceFault(str(path), str(error))
    for paths in found.values():
        yield SourceFault(str(paths[0]), f"has no words: {timings / paths[0].stem}.json does not exist.")


def _dialogue(path: Path, audio_files: list[Path], *, audio: Path, moshi: str) -> SourceRecording:
    if len(audio_files) != 1:
        problem = "no audio file" if not audio_files else f"{len(audio_files)} audio files"
        raise DataError(f"{problem} of this name in {audio}; it needs one.")
    (audio_file,) = audio_files
    left = SIDES.index(moshi)
    return SourceRecording(
        str(path), path.stem, (Track(audio_file, left), Track(audio_file, 1 - left)), _words(path, moshi)
    )


def _words(path: Path, moshi: str) -> tuple[Word, ...]:
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({error}).") from None
    if not isinstance(content, list):
        raise DataError('expected a list of {"speaker", "word", "start", "end"}.')
    words = []
    for position, entry in enumerate(content, 1):
        try:
            words.append(_word(entry, moshi))
        except DataError as error:
            raise DataError(f"entry {position}: {error}") from None
    return tuple(words)


def _word(entry: Any, moshi: str) -> Word:
    if not isinstance(entry, dict):
        raise DataError('expected {"speaker", "word", "start", "end"}.')
    if entry.get("speaker") not in SIDES:
        raise DataError(f'"speaker" must be A, the left channel, or B, not {entry.get("speaker")!r}.')
    speaker = SPEAKERS[entry["speaker"] != moshi]
    return Word(text(entry, "word").strip(), number(entry, "start"), number(entry, "end"), speaker)
