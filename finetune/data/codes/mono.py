"""What recordings become in training: as many voices as the model knows.

Shapes: K codebooks of one channel, T frames.
"""

from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from finetune.data.recordings.lines import Recording
from finetune.errors import DataError

MonoPolicy = Literal["error", "duplicate", "user_silent", "one_voice"]


class Codes(Protocol):
    """Where codes of recordings are loaded from, see `CodeCache`."""

    @property
    def num_codebooks(self) -> int:
        """K."""
        ...

    def num_frames(self, recording: Recording) -> int:
        """Frames of a recording."""
        ...

    def load(self, recording: Recording, start_frame: int = 0, num_frames: int | None = None) -> Tensor:
        """Int64 codes, `[channels * K, num_frames]`."""
        ...


def mono_policy(configured: MonoPolicy, *, num_voices: int) -> MonoPolicy:
    """What mono recordings are to a model: one that knows one voice never refuses them."""
    return configured if num_voices == 2 else "one_voice"


class Voices:
    """Codes of as many voices as the model knows, whatever the recordings have."""

    def __init__(self, codes: Codes, policy: MonoPolicy, *, silence: Tensor | None = None) -> None:
        """Keep the pieces.

        Args:
            codes: of mono and stereo recordings.
            policy: of mono ones: `error` refuses them; `duplicate` gives both channels the same codes;
                `user_silent` makes them Moshi's voice, on the left, beside a silent user. `one_voice` takes
                them as they are, and of stereo ones the left channel.
            silence: codes of digital silence, `[K, T]`; with `user_silent` as long as the longest mono
                recording, with `one_voice` what is heard after the end of one, as long as is read there.
        """
        self._codes = codes
        self._policy = policy
        self._silence = silence

    def load(self, recording: Recording, start_frame: int = 0, num_frames: int | None = None) -> Tensor:
        """Int64 codes, `[2 * K, num_frames]`, the left channel first; of one voice `[K, num_frames]`.

        Raises:
            DataError: the recording is mono and may not be, or see `CodeCache.load`.
        """
        if self._policy == "one_voice":
            return self._one_voice(recording, start_frame, num_frames)
        codes = self._codes.load(recording, start_frame, num_frames)
        if len(codes) == 2 * self._codes.num_codebooks:
            return codes
        if self._policy == "duplicate":
            return torch.cat([codes, codes])
        if self._policy == "user_silent":
            assert self._silence is not None and self._silence.shape[1] >= start_frame + codes.shape[1]
            return torch.cat([codes, self._silence[:, start_frame : start_frame + codes.shape[1]]])
        raise mono_error(recording.path)

    def _one_voice(self, recording: Recording, start_frame: int, num_frames: int | None) -> Tensor:
        there = self._codes.num_frames(recording)
        wanted = there - start_frame if num_frames is None else num_frames
        heard = min(wanted, max(0, there - start_frame))
        parts = []
        if heard:
            parts.append(self._codes.load(recording, start_frame, heard)[: self._codes.num_codebooks])
        if wanted > heard:
            assert self._silence is not None
            after = max(0, start_frame - there)
            parts.append(self._silence[:, after : after + wanted - heard])
        return torch.cat(parts, 1)


def mono_error(path: Path) -> DataError:
    """The error of a mono recording under the policy `error`."""
    return DataError(
        f"{path}: mono, which trains 9 streams instead of 17; make it a stereo file with Moshi on the left "
        "and the user on the right, or set data.mono to duplicate (one voice on both channels) or "
        "user_silent (Moshi's voice, and a user who says nothing)."
    )
