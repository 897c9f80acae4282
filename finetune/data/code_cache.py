"""Mimi codes kept on disk, so that a recording is encoded once and not in every epoch.

Shapes: K codebooks of one channel, T frames.
"""

import copy
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import LongTensor, Tensor
from tqdm import tqdm

from finetune.data.audio import read_audio
from finetune.data.codec import encode_recording
from finetune.data.manifest import Recording
from finetune.errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDER_NAME = ".moshi_ttt_codes"
_MAX_STEM_BYTES = 200  # a file name has at most 255, and the key comes after it


class UnwritableCacheError(DataError):
    """The folder of the codes cannot be written: nothing that one recording could be blamed for."""


class CodeCache:
    """Codes of recordings, one safetensors file each, named after all that the codes depend on.

    That is the audio file's name, size and modification time, the contents of the Mimi weights, Mimi's
    configuration, K, the channels when they are not two, and the version of the format. When one of them
    changes, the recording counts as missing.
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
        """Hashes the Mimi weights, which takes about a second; writes nothing.

        Args:
            mimi_weights: File with the weights of the codec.
            mimi_config: Its configuration, None for Moshi's default.
            num_codebooks: K.
            cache_dir: One folder for all codes; by default ``.moshi_ttt_codes`` beside each audio file.
            key: Configuration key or option that held ``cache_dir``, for messages.

        Raises:
            DataError: The Mimi weights cannot be read.
        """
        self.num_codebooks = num_codebooks
        self.channels = 2
        self.cache_dir = cache_dir
        self.key = key
        self._codec = {
            "format": FORMAT_VERSION,
            "mimi_weights": _hash_file(mimi_weights),
            "mimi_config": mimi_config,
            "num_codebooks": num_codebooks,
        }

    def mono(self) -> "CodeCache":
        """Returns a cache of mono files, with the same codec and folder; it never mixes with this one."""
        cache = copy.copy(self)
        cache.channels = 1
        cache._codec = {**self._codec, "channels": 1}
        return cache

    def path(self, recording: Recording) -> Path:
        """Returns where the codes of a recording are or would be.

        Raises:
            DataError: The audio file cannot be found.
        """
        return self._locate(recording)[0]

    def missing(self, recordings: Sequence[Recording]) -> list[Recording]:
        """Returns the recordings without codes, in their order."""
        return [recording for recording in recordings if not self.path(recording).is_file()]

    def fill(
        self,
        recordings: Sequence[Recording],
        mimi: MimiModel,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: bool,
    ) -> int:
        """Encodes this rank's share of the missing recordings.

        All ranks need the same ``recordings``. A rank returns when its own share is done: wait for the others
        before loading.

        Args:
            recordings: All recordings of the data set.
            mimi: The codec with ``num_codebooks`` active codebooks, on any device.
            rank: This process, from 0.
            world_size: Number of processes.
            progress: Show a progress bar.

        Returns:
            How many recordings this rank encoded.

        Raises:
            DataError: A recording cannot be used, or the cache cannot be written.
            ValueError: ``mimi`` has another number of codebooks.
        """
        self._check_codebooks(mimi)
        # Shares are cut from all recordings: which ones are missing differs between ranks as soon as
        # one of them has written. Sorted, so that the long ones are spread.
        by_length = sorted(recordings, key=lambda recording: -recording.duration_sec)
        share = self.missing(by_length[rank::world_size])
        for recording in tqdm(share, desc="Encoding audio", unit="file", disable=not progress):
            self._make_folder(recording)
            audio = read_audio(
                recording.path, sample_rate=mimi.sample_rate, expected_duration_sec=recording.duration_sec
            )
            self.add(recording, mimi, audio)
        if share:
            logger.info("Encoded %d recordings on rank %d.", len(share), rank)
        return len(share)

    def add(self, recording: Recording, mimi: MimiModel, audio: np.ndarray | Iterable[np.ndarray]) -> None:
        """Encodes one recording and keeps its codes.

        Args:
            recording: Whose codes these are.
            mimi: The codec with ``num_codebooks`` active codebooks, on any device.
            audio: float samples ``[channels, num_samples]`` at ``mimi.sample_rate``, or consecutive pieces of
                them.

        Raises:
            UnwritableCacheError: The cache cannot be written.
            ValueError: ``mimi`` has another number of codebooks, or ``audio`` of channels.
        """
        self._check_codebooks(mimi)
        self._make_folder(recording)
        path, key = self._locate(recording)
        codes = encode_recording(mimi, audio)
        if len(codes) != self.channels:
            raise ValueError(f"the audio has {len(codes)} channels, the cache {self.channels}.")
        self._write(path, key=key, codes=codes)

    def num_frames(self, recording: Recording) -> int:
        """Returns T of a cached recording from its file's header.

        Raises:
            DataError: See ``load``.
        """
        return self._read(recording, start_frame=0, num_frames=0)[1]

    def load(self, recording: Recording, start_frame: int = 0, num_frames: int | None = None) -> LongTensor:
        """Reads codes, only the wanted frames.

        Args:
            recording: A recording that has been encoded.
            start_frame: First frame.
            num_frames: How many frames; None for all up to the end.

        Returns:
            int64 codes, ``[channels * K, num_frames]``: the left channel's codebooks, then the
            right channel's.

        Raises:
            DataError: There are no codes, or their file is corrupt or belongs to something else.
            ValueError: The frames are not within the recording.
        """
        codes = self._read(recording, start_frame=start_frame, num_frames=num_frames)[0]
        if codes.is_floating_point() or (codes.numel() and codes.min() < 0):
            raise _corrupt(self.path(recording), "not codes")
        return codes.flatten(0, 1).long()  # [channels, K, T] -> [channels * K, T]

    def _read(self, recording: Recording, *, start_frame: int, num_frames: int | None) -> tuple[Tensor, int]:
        """Returns the wanted codes [channels, K, num_frames] and T."""
        path, key = self._locate(recording)
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    raise _corrupt(path, "it was made from other audio or another codec")
                codes = file.get_slice("codes")
                shape = codes.get_shape()
                expected = [self.channels, self.num_codebooks]
                if len(shape) != 3 or shape[:2] != expected or shape[2] == 0:
                    raise _corrupt(path, f"shape {shape} instead of [{expected[0]}, {expected[1]}, T]")
                stop = shape[2] if num_frames is None else start_frame + num_frames
                if not 0 <= start_frame <= stop <= shape[2]:
                    raise ValueError(f"{path}: frames {start_frame} to {stop} of {shape[2]}.")
                return codes[:, :, start_frame:stop], shape[2]
        except FileNotFoundError as error:
            raise DataError(
                f"{recording.path}: no codes at {path}; the audio changed or was never encoded, start again."
            ) from error
        except (SafetensorError, OSError) as error:
            raise _corrupt(path, str(error)) from error

    def _locate(self, recording: Recording) -> tuple[Path, str]:
        """Returns the cache file's path and its full key."""
        audio = recording.path
        try:
            stat = audio.stat()
        except OSError as error:
            raise DataError(f"{audio}: cannot read the audio file ({error.strerror}).") from error
        key_parts = {**self._codec, "name": audio.name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if self.cache_dir is not None:
            # Here files of one name from several folders meet, possibly of one size and time.
            key_parts["folder"] = os.path.abspath(audio.parent)
        key = hashlib.sha256(json.dumps(key_parts, sort_keys=True).encode()).hexdigest()
        folder = self.cache_dir if self.cache_dir is not None else audio.parent / FOLDER_NAME
        return folder / f"{_short(audio.stem)}.{key[:20]}.safetensors", key

    def _write(self, path: Path, *, key: str, codes: LongTensor) -> None:
        small = codes.to(torch.int16 if codes.max() <= torch.iinfo(torch.int16).max else torch.int32)
        content = save({"codes": small.contiguous()}, metadata={"key": key, "format": str(FORMAT_VERSION)})
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(path.parent, error) from error

    def _check_codebooks(self, mimi: MimiModel) -> None:
        if mimi.num_codebooks != self.num_codebooks:
            raise ValueError(f"mimi has {mimi.num_codebooks} codebooks, the cache {self.num_codebooks}.")

    def _make_folder(self, recording: Recording) -> None:
        """Makes the folder and finds out that it cannot be written before minutes of encoding are spent."""
        folder = self.path(recording).parent
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


def _short(stem: str) -> str:
    # safetensors opens no file whose name is not UTF-8.
    text = os.fsencode(stem).decode(errors="backslashreplace")
    return text.encode()[:_MAX_STEM_BYTES].decode(errors="ignore")


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot read the Mimi weights ({error.strerror}).") from error
    return digest.hexdigest()


def _corrupt(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: unusable cache file ({reason}); delete it, the next start encodes it again.")
