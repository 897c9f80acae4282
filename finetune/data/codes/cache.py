"""Mimi codes kept on disk, so that a recording is encoded once and not in every epoch.

Shapes: K codebooks of one channel, T frames.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moshi.models import MimiModel
from moshi.models.loaders import CheckpointInfo
from torch import Tensor
from tqdm import tqdm

from finetune.data.audio.read import read_audio_header, read_pieces
from finetune.data.codes.code_file import (
    FORMAT_VERSION,
    CacheError,
    CodeEntry,
    CorruptCodesError,
    code_file_bytes,
    corrupt,
    read_codes,
    read_entry,
)
from finetune.data.codes.encode_audio import encode_recording
from finetune.data.codes.leftovers import temporary_file
from finetune.data.codes.mono import mono_error
from finetune.data.recordings.lines import Recording
from finetune.errors import ConfigError, DataError
from finetune.files import hash_file, hash_json

logger = logging.getLogger(__name__)

FOLDER_NAME = ".moshi_ttt_codes"
_MAX_STEM_BYTES = 200  # a file name has at most 255, and the key comes after it


class UnwritableCacheError(CacheError):
    """The folder of the codes cannot be written."""


class CodeCache:
    """Codes of mono and stereo recordings, one file each, named after all that the codes depend on.

    That is the audio file's name, size and modification time, the contents of the Mimi weights, Mimi's
    configuration, K and the version of the format. When one of them changes, the recording counts as missing.
    """

    def __init__(
        self,
        *,
        mimi_weights: Path,
        mimi_config: dict | None,
        num_codebooks: int,
        cache_dir: Path | None = None,
        key: str = "data.cache_dir",
    ) -> None:
        """Hash the Mimi weights, which takes about a second; writes nothing.

        Args:
            mimi_weights: file with the weights of the codec.
            mimi_config: its configuration, None for Moshi's default.
            num_codebooks: K.
            cache_dir: one folder for all codes; by default `.moshi_ttt_codes` beside each audio file.
            key: configuration key or option that held `cache_dir`, for messages.

        Raises:
            DataError: the Mimi weights cannot be read.
        """
        self.num_codebooks = num_codebooks
        self.cache_dir = cache_dir
        self.key = key
        self.codec = hash_json(
            {
                "mimi_weights": _hash_of(mimi_weights, what="the Mimi weights"),
                "mimi_config": mimi_config,
                "num_codebooks": num_codebooks,
            }
        )
        self._listings: dict[Path, dict[str, list[str]]] = {}

    @classmethod
    def of_model(
        cls,
        info: CheckpointInfo,
        *,
        num_codebooks: int,
        cache_dir: str | None = None,
        key: str = "data.cache_dir",
    ) -> "CodeCache":
        """The cache of a model's codec; the arguments and errors are those of `CodeCache`.

        Raises:
            ConfigError: `cache_dir` cannot be the name of a folder.
        """
        return cls(
            mimi_weights=Path(info.mimi_weights),
            mimi_config=info.mimi_config,
            num_codebooks=num_codebooks,
            cache_dir=None if cache_dir is None else _folder_named(cache_dir, key=key),
            key=key,
        )

    def path(self, recording: Recording) -> Path:
        """Where the codes of a recording are or would be.

        Raises:
            DataError: the audio file cannot be found.
        """
        return self.locate(recording)[0]

    def folder(self, recording: Recording) -> Path:
        """The folder of a recording's codes."""
        return self.cache_dir if self.cache_dir is not None else recording.path.parent / FOLDER_NAME

    def is_encoded(self, recording: Recording) -> bool:
        """Say whether a recording has codes; raises DataError when the audio file cannot be found."""
        return self.path(recording).is_file()

    def missing(self, recordings: Sequence[Recording]) -> list[Recording]:
        """The recordings without codes, in their order."""
        return [recording for recording in recordings if not self.is_encoded(recording)]

    def fill(
        self,
        recordings: Sequence[Recording],
        mimi: MimiModel,
        *,
        allow_mono: bool = False,
        on_fault: Callable[[Recording, DataError], None] | None = None,
        rank: int = 0,
        world_size: int = 1,
        progress: bool,
    ) -> int:
        """Encode this rank's share of the missing recordings.

        All ranks need the same `recordings`. A rank returns when its own share is done: wait for the others
        before loading.

        Args:
            recordings: all recordings of the data set.
            mimi: the codec with `num_codebooks` active codebooks, on any device.
            allow_mono: encode mono recordings too.
            on_fault: called with each recording that cannot be used and why; None raises the first error.
            rank: this process, from 0.
            world_size: number of processes.
            progress: show a progress bar.

        Returns:
            How many recordings this rank encoded.

        Raises:
            CacheError: the cache cannot be written.
            DataError: a recording cannot be used, and `on_fault` is None.
            ValueError: `mimi` has another number of codebooks.
        """
        self._check_codebooks(mimi)
        # Shares are cut from all recordings: which ones are missing differs between ranks as soon as
        # one of them has written. Sorted, so that the long ones are spread.
        by_length = sorted(recordings, key=lambda recording: -recording.duration_sec)
        count = 0
        share = by_length[rank::world_size]
        for recording in tqdm(share, desc="Encoding audio", unit="file", disable=not progress):
            try:
                count += self.encode(recording, mimi, allow_mono=allow_mono)
            except CacheError:
                raise
            except DataError as error:
                if on_fault is None:
                    raise
                on_fault(recording, error)
        self._listings.clear()
        if count:
            logger.info("Encoded %d recordings on rank %d.", count, rank)
        return count

    def encode(self, recording: Recording, mimi: MimiModel, *, allow_mono: bool = True) -> bool:
        """Encode one recording, unless its codes or those of the same audio bytes are there already.

        A recording without a stated length (`duration_sec` 0) may have any.

        Returns:
            Whether it was encoded now.

        Raises:
            UnwritableCacheError: the cache cannot be written.
            DataError: the recording cannot be used.
            ValueError: `mimi` has another number of codebooks.
        """
        self._check_codebooks(mimi)
        path, key = self.locate(recording)
        if path.is_file():
            return False
        self._make_folder(path.parent)
        if read_audio_header(recording.path).channels == 1 and not allow_mono:
            raise mono_error(recording.path)
        if self._reuse(recording, path, key):
            return False
        pieces = read_pieces(
            recording.path,
            sample_rate=mimi.sample_rate,
            expected_duration_sec=recording.duration_sec or None,
        )
        codes = encode_recording(mimi, pieces)
        digest = _hash_of(recording.path, what="the audio file")
        if self.locate(recording)[1] != key:
            raise DataError(f"{recording.path}: was changed while it was read; start again.")
        self._write(path, codes, key=key, audio_bytes=_size(recording.path), audio_sha256=digest)
        return True

    def entry(self, recording: Recording) -> CodeEntry:
        """Read what is known of a recording's codes: channels, K, T, without the codes.

        Raises:
            CorruptCodesError: their file is damaged or belongs to something else.
            DataError: there are no codes.
        """
        path, key = self.locate(recording)
        try:
            entry = read_entry(path)
        except FileNotFoundError as error:
            raise DataError(
                f"{recording.path}: no codes at {path}; the audio changed or was never encoded, start again."
            ) from error
        if entry.key != key or entry.codec != self.codec:
            raise corrupt(path, "it was made from other audio or another codec")
        if entry.num_codebooks != self.num_codebooks:
            raise corrupt(path, f"it has {entry.num_codebooks} codebooks instead of {self.num_codebooks}")
        return entry

    def num_frames(self, recording: Recording) -> int:
        """T of an encoded recording; raises as `entry` does."""
        return self.entry(recording).num_frames

    def load(self, recording: Recording, start_frame: int = 0, num_frames: int | None = None) -> Tensor:
        """Read codes, only the wanted frames, and check them.

        Args:
            recording: a recording that has been encoded.
            start_frame: first frame.
            num_frames: how many frames; None for all up to the end.

        Returns:
            int64 codes, `[channels * K, num_frames]`: the left channel's codebooks, then the
            right channel's, if there is one.

        Raises:
            CorruptCodesError: their file is damaged or belongs to something else.
            DataError: there are no codes.
            ValueError: the frames are not within the recording.
        """
        entry = self.entry(recording)
        stop = entry.num_frames if num_frames is None else start_frame + num_frames
        return read_codes(entry, start_frame, stop).flatten(0, 1)  # [channels, K, T] -> [channels * K, T]

    def verify(self, recording: Recording) -> None:
        """Read all codes of a recording and the audio that they were made from.

        Raises:
            CorruptCodesError: a part of the codes has changed, or the audio has.
            DataError: there are no codes, or the audio cannot be read.
        """
        entry = self.entry(recording)
        read_codes(entry, 0, entry.num_frames)
        if _hash_of(recording.path, what="the audio file") != entry.audio_sha256:
            raise corrupt(entry.path, f"{recording.path} holds other bytes than when it was encoded")

    def _reuse(self, recording: Recording, path: Path, key: str) -> bool:
        """Take codes over from another entry of the same audio bytes: after a copy, a move or a touch."""
        digest = None
        for other in self._listing(path.parent).get(_short(recording.path.stem), ()):
            try:
                entry = read_entry(path.parent / other)
                if entry.codec != self.codec or entry.audio_bytes != _size(recording.path):
                    continue
                digest = digest or _hash_of(recording.path, what="the audio file")
                if entry.audio_sha256 != digest:
                    continue
                codes = read_codes(entry, 0, entry.num_frames)
            except (FileNotFoundError, CorruptCodesError):
                continue  # it is of no use here, and encoding goes on as if it were not there
            if self.locate(recording)[1] == key:
                self._write(path, codes, key=key, audio_bytes=entry.audio_bytes, audio_sha256=digest)
                return True
        return False

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """The files of a folder by the stem of their audio file, as they were at the first look."""
        if folder not in self._listings:
            by_stem: dict[str, list[str]] = {}
            for name in sorted(os.listdir(folder)):
                if name.endswith(".safetensors"):
                    by_stem.setdefault(name.rsplit(".", 2)[0], []).append(name)
            self._listings[folder] = by_stem
        return self._listings[folder]

    def locate(self, recording: Recording) -> tuple[Path, str]:
        """The cache file's path and its full key."""
        audio = recording.path
        try:
            stat = audio.stat()
        except (OSError, ValueError) as error:  # ValueError: no file can have this name
            raise DataError(f"{audio}: cannot read the audio file ({_reason(error)}).") from error
        key_parts = {
            "format": FORMAT_VERSION,
            "codec": self.codec,
            "name": audio.name,
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }
        if self.cache_dir is not None:
            # Here files of one name from several folders meet, possibly of one size and time.
            key_parts["folder"] = os.path.abspath(audio.parent)
        key = hash_json(key_parts)
        return self.folder(recording) / f"{_short(audio.stem)}.{key[:20]}.safetensors", key

    def _write(self, path: Path, codes: Tensor, *, key: str, audio_bytes: int, audio_sha256: str) -> None:
        content = code_file_bytes(
            codes, key=key, codec=self.codec, audio_bytes=audio_bytes, audio_sha256=audio_sha256
        )
        temporary = temporary_file(path.parent)
        try:
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(path.parent, error) from error

    def _check_codebooks(self, mimi: MimiModel) -> None:
        if mimi.num_codebooks != self.num_codebooks:
            raise ValueError(f"mimi has {mimi.num_codebooks} codebooks, the cache {self.num_codebooks}.")

    def _make_folder(self, folder: Path) -> None:
        """Make the folder and find out that it cannot be written before minutes of encoding are spent."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(0, "no write permission")
        except OSError as error:
            raise self._unwritable(folder, error) from error

    def _unwritable(self, folder: Path, error: OSError) -> DataError:
        return UnwritableCacheError(
            f"{self.key}: cannot write Mimi codes to {folder} ({error.strerror}); "
            f"set {self.key} to a folder that is writable and has space."
        )


def _folder_named(name: str, *, key: str) -> Path:
    if not name or "\0" in name:
        raise ConfigError(f"{key}: {name!r} is not the name of a folder.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {name}: there is no such home directory.") from error


def _hash_of(path: Path, *, what: str) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read {what} ({error.strerror}).") from error


def _short(stem: str) -> str:
    # Not every tool opens a file whose name is not UTF-8.
    text = os.fsencode(stem).decode(errors="backslashreplace")
    return text.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot read the audio file ({error.strerror}).") from error


def _reason(error: OSError | ValueError) -> object:
    return getattr(error, "strerror", None) or error
