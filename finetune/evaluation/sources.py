"""Which recordings are measured: those of a manifest, of a folder tree, or one file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from finetune.data.audio.find import AUDIO_SUFFIXES, find_audio_files, no_audio_files, printable
from finetune.data.recordings.lines import ManifestEntry, read_manifest
from finetune.errors import ConfigError, DataError

GROUPS = ("single", "speaker")


@dataclass(frozen=True)
class Source:
    """One audio file.

    Attributes:
        name: its path relative to the data, with `/`; no other recording of the data has it.
        path: the file. Nothing has looked at it yet.
        duration_sec: its length as a manifest states it, in seconds.
        speaker: who speaks, None when nothing says so.
    """

    name: str
    path: Path
    duration_sec: float | None = None
    speaker: str | None = None

    @property
    def alignment_path(self) -> Path:
        """Word timings, which need not exist."""
        return self.path.with_suffix(".json")


def find_sources(data: str) -> list[Source]:
    """List the recordings of a data set in a fixed order: a manifest's own, or sorted by name.

    Args:
        data: a manifest (`.jsonl`) whose lines are `{"path": "a.flac", "duration": seconds, "speaker":
            name}`, the last two optional; a folder, of which every audio file at any depth is taken; or an
            audio file. In a folder, names that start with a dot are skipped and links are followed, but no
            folder is entered twice.

    Raises:
        DataError: `data` does not exist or holds no recording, or its manifest is malformed.
    """
    if not data:  # as a path it would be the current directory
        raise DataError("--data: is empty; name a .jsonl manifest, a folder or an audio file.")
    path = Path(data).expanduser()
    if path.is_dir():
        try:
            return scan_folder(path)
        except DataError as error:
            raise DataError(f"--data: {error}") from None
    if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
        return [Source(printable(path.name), path)]
    if path.suffix == ".jsonl" and path.is_file():
        return [_from_entry(entry) for entry in read_manifest(path, key="--data", need_duration=False)]
    problem = "is no manifest and no audio file" if path.exists() else "does not exist"
    raise DataError(f"--data: {path} {problem}; name a .jsonl manifest, a folder or an audio file.")


def group_sources(sources: Sequence[Source], group: str) -> dict[str, list[Source]]:
    """What becomes one stream, by its name.

    Args:
        sources: all recordings.
        group: `single`, every recording by itself; or `speaker`, all of a speaker sorted by name.

    Raises:
        ConfigError: `group` is neither.
        DataError: a recording's speaker is not known, or two recordings have one name.
    """
    if group == "single":
        by_name: dict[str, list[Source]] = {}
        for source in sources:
            if source.name in by_name:  # names that differ in what cannot be printed
                raise DataError(f"--data: two recordings are called {source.name}; rename one.")
            by_name[source.name] = [source]
        return by_name
    if group != "speaker":
        raise ConfigError(f"--group: {group} is unknown; it is one of {', '.join(GROUPS)}.")
    groups: dict[str, list[Source]] = {}
    for source in sources:
        if source.speaker is None:
            raise DataError(
                f"--group speaker: nothing says who speaks in {source.path}; put it into a folder named "
                'after the speaker, or give "speaker" in a manifest.'
            )
        groups.setdefault(source.speaker, []).append(source)
    return {speaker: sorted(groups[speaker], key=_sort_key) for speaker in sorted(groups)}


def _sort_key(source: Source) -> tuple[str, ...]:
    return PurePath(source.name).parts


def scan_folder(root: Path) -> list[Source]:
    """List the audio files of a folder as `find_sources` does.

    Raises:
        DataError: there is none, or a folder cannot be listed.
    """
    files = find_audio_files(root)
    if not files:
        raise no_audio_files(root)
    sources = []
    for path in files:
        relative = path.relative_to(root)
        sources.append(Source(printable(relative.as_posix()), path, speaker=_first_folder(relative)))
    return sorted(sources, key=_sort_key)


def _from_entry(entry: ManifestEntry) -> Source:
    relative = PurePath(os.path.relpath(entry.path, entry.folder))
    outside = ".." in relative.parts
    speaker = entry.fields.get("speaker")
    if speaker is None:
        speaker = None if outside else _first_folder(relative)
    elif isinstance(speaker, bool) or not isinstance(speaker, str | int) or speaker == "":
        raise DataError(f'{entry.where}: "speaker" must be a name or a number, not {speaker!r}.')
    name = os.path.abspath(entry.path) if outside else relative.as_posix()
    return Source(printable(name), entry.path, entry.duration_sec, None if speaker is None else str(speaker))


def _first_folder(relative: PurePath) -> str | None:
    return printable(relative.parts[0]) if len(relative.parts) > 1 else None
