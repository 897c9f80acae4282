"""Mimi codes of the measured recordings, encoded once and kept on disk.

Shapes: K codebooks of one channel, T frames.
"""

import math

from moshi.models import MimiModel
from moshi.models.loaders import CheckpointInfo
from torch import Tensor

from finetune.data.audio.checks import AudioHeader, check_duration
from finetune.data.audio.read import read_audio_header
from finetune.data.codes.cache import CodeCache
from finetune.data.codes.encode_audio import encode_silence
from finetune.data.recordings.lines import Recording
from finetune.errors import DataError
from finetune.evaluation.sources import Source


class CodeStore:
    """Codes of mono and stereo recordings, in the cache of training."""

    def __init__(
        self, mimi: MimiModel, info: CheckpointInfo, cache_dir: str | None, *, key: str = "--cache-dir"
    ) -> None:
        """Hash the codec's weights; writes nothing.

        Args:
            mimi: the codec.
            info: the files that it was loaded from.
            cache_dir: one folder for all codes; by default `.moshi_ttt_codes` beside each audio file.
            key: configuration key or option that held `cache_dir`, for messages.

        Raises:
            ConfigError: `cache_dir` cannot be the name of a folder.
            DataError: the codec's weights cannot be read.
        """
        self.mimi = mimi
        self._cache = CodeCache.of_model(info, num_codebooks=mimi.num_codebooks, cache_dir=cache_dir, key=key)
        self._last: tuple[Source, Tensor] | None = None
        self._silence: Tensor | None = None

    def header(self, source: Source) -> AudioHeader:
        """What a file says about itself.

        Raises:
            DataError: it cannot be read, has more than two channels, or holds nothing.
        """
        header = read_audio_header(source.path)
        if self.expected_frames(header) == 0:
            raise DataError(f"{source.path}: holds no samples; remove it or export it again.")
        return header

    def expected_frames(self, header: AudioHeader) -> int:
        """T of a file that is as long as it says."""
        num_samples = round(header.num_samples * self.mimi.sample_rate / header.sample_rate)
        return math.ceil(num_samples / self.mimi.frame_size)

    def is_encoded(self, source: Source) -> bool:
        """Say whether the codes are there; raises DataError when the audio is not."""
        return self._cache.is_encoded(_recording(source))

    def encode(self, source: Source) -> None:
        """Encode a recording whose codes are missing.

        Raises:
            UnwritableCacheError: the cache cannot be written.
            DataError: the recording cannot be used.
        """
        self._cache.encode(_recording(source), self.mimi)

    def num_frames(self, source: Source, header: AudioHeader) -> int:
        """T of an encoded recording.

        Raises:
            DataError: as `load` does, or the manifest states another length: codes that were there already
                have been made without a look at it.
        """
        num_frames = self._cache.num_frames(_recording(source))
        if source.duration_sec is not None:
            shortest, longest = ((num_frames - rest) / self.mimi.frame_rate for rest in (1, 0))
            duration_sec = min(max(header.num_samples / header.sample_rate, shortest), longest)
            check_duration(source.path, duration_sec, expected_duration_sec=source.duration_sec)
        return num_frames

    def load(self, source: Source, header: AudioHeader) -> Tensor:
        """All codes of a recording, int64 `[channels, K, T]`; the last one is kept in memory.

        Raises:
            DataError: there are no codes, or their file is corrupt or belongs to something else.
        """
        if self._last is None or self._last[0] != source:
            codes = self._cache.load(_recording(source))
            self._last = source, codes.unflatten(0, (header.channels, -1))
        return self._last[1]

    def encode_silence(self, num_frames: int) -> None:
        """Encode digital silence of at least one frame, see `encode_silence` of `finetune.data.codes`."""
        self._silence = encode_silence(self.mimi, num_frames)

    def silence(self, start: int, stop: int) -> Tensor:
        """The codes of encoded silence, int64 `[K, stop - start]`, from its frame `start` on."""
        assert self._silence is not None
        return self._silence[:, start:stop]


def _recording(source: Source) -> Recording:
    return Recording(source.path, source.duration_sec or 0.0, source.alignment_path)
