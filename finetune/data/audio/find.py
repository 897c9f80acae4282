"""The audio files of a folder tree, and their names in one line."""

import os
import re
from pathlib import Path, PurePath

from finetune.errors import DataError

# What sphn decodes; of AIFF files it does not know the length.
AUDIO_SUFFIXES = frozenset({".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"})


def find_audio_files(root: Path) -> list[Path]:
    """List what is called like an audio file below a folder, at any depth, sorted part by part.

    Names that start with a dot are skipped, links are followed, but no folder is entered twice. Nothing has
    looked into the files: a pipe or a broken link may be among them.

    Returns:
        Paths that start with `root`; maybe none.

    Raises:
        DataError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list the folder {error.filename} ({error.strerror}).") from error

    entered: set[tuple[int, int]] = set()
    found = []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if _is_audio_name(name)]
    return sorted(found, key=lambda path: path.parts)


def no_audio_files(root: Path) -> DataError:
    """What to raise for a folder in which `find_audio_files` finds nothing."""
    endings = " ".join(sorted(AUDIO_SUFFIXES))
    manifests = "; name the .jsonl file itself to use a manifest" if any(root.glob("*.jsonl")) else ""
    return DataError(f"no audio file below the folder {root} ({endings}){manifests}.")


def printable(text: str) -> str:
    r"""Text in one line of UTF-8: control characters and what is not UTF-8 become `\n`, `\udcff`."""
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], encodable)


def _is_audio_name(name: str) -> bool:
    return not name.startswith(".") and PurePath(name).suffix.lower() in AUDIO_SUFFIXES
