"""Which recordings are to be annotated, and what is said in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.audio.find import find_audio_files, no_audio_files
from finetune.data.recordings.lines import read_manifest
from finetune.data.recordings.recording import noted_before
from finetune.errors import ConfigError, DataError
from moshi_ttt.files.regular_file import read_text

CHANNELS = ("left", "right")

_TEXT_FORM = 'expected {"left": "what Moshi says", "right": "what the user says"}'


@dataclass(frozen=True)
class AudioRecording:
    """One stereo recording.

    Attributes:
        path: the audio file.
        texts: the field "text" of its line in the manifest, None where there is none.
    """

    path: Path
    texts: Any = None

    @property
    def alignment_path(self) -> Path:
        """The word timings, beside the audio."""
        return self.path.with_suffix(".json")


def find_recordings(source: Path) -> list[AudioRecording]:
    """List the recordings of a manifest, or the audio files below a folder.

    Args:
        source: a `.jsonl` file as for training, where "duration" may be missing, or a folder. What
            is taken of a folder, see `find_audio_files`.

    Returns:
        At least one, in the manifest's order or sorted by path.

    Raises:
        DataError: nothing is found, the manifest is malformed, or two recordings would share one file of word
            timings.
    """
    source = source.expanduser()
    if source.is_dir():
        recordings = [AudioRecording(path) for path in find_audio_files(source)]
        if not recordings:
            raise no_audio_files(source)
    elif source.suffix == ".jsonl" and source.is_file():
        entries = read_manifest(source, key="manifest", need_duration=False)
        recordings = [AudioRecording(entry.path, entry.fields.get("text")) for entry in entries]
    elif source.exists():
        raise DataError(f"{source}: is neither a folder nor a manifest (.jsonl).")
    else:
        raise DataError(f"{source}: does not exist; name a folder of recordings or a manifest (.jsonl).")
    _check_distinct(recordings)
    return recordings


def take_shard(recordings: list[AudioRecording], shard: str) -> list[AudioRecording]:
    """The share of one of several jobs; together, shards 1/N to N/N are all recordings, each once.

    Raises:
        ConfigError: `shard` is not I/N with I from 1 to N.
    """
    index, _, count = shard.partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit()) or not (
        1 <= int(index) <= int(count)
    ):
        raise ConfigError(f"--shard: {shard!r} is not I/N with I from 1 to N, such as 1/4.")
    return recordings[int(index) - 1 :: int(count)]


def read_transcript(recording: AudioRecording, channel: str) -> str | None:
    """What is said on one channel.

    It is the entry "left" or "right" of the manifest's field "text", or else the file `name.left.txt` or
    `name.right.txt` beside `name.wav`.

    Returns:
        The text, None where there is none.

    Raises:
        DataError: both are there, or one cannot be used.
    """
    path = recording.path.with_suffix(f".{channel}.txt")
    text = _text_of_manifest(recording.texts, channel)
    if not path.exists():
        return text
    if text is not None:
        raise DataError(f'{path} and the field "text" of the manifest both say what is said; remove one.')
    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}).") from error


def _text_of_manifest(texts: Any, channel: str) -> str | None:
    if texts is None:
        return None
    valid = isinstance(texts, dict) and texts.keys() <= set(CHANNELS)
    if not valid or not all(isinstance(text, str) for text in texts.values()):
        raise DataError(f'"text" of the manifest: {_TEXT_FORM}.')
    return texts.get(channel)


def _check_distinct(recordings: list[AudioRecording]) -> None:
    seen: dict[str, Path] = {}
    for recording in recordings:
        other = noted_before(seen, recording.alignment_path, recording.path)
        if other is not None:
            raise DataError(
                f"{other} and {recording.path} would share {recording.alignment_path}; rename one."
            )
