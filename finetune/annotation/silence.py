"""Takes out long silences before an alignment.

They cost time, and the features are normalised by what is there.
"""

from typing import NamedTuple

import numpy as np

_FRAME_SEC = 0.01
_QUIET = 0.01  # of the level of the loudest frame: 40 dB below
_MARGIN_SEC = 0.25  # of silence that stays on either side of sound


class Condensed(NamedTuple):
    """Sound without long silences.

    Attributes:
        samples: [num_samples], the parts that stay after each other.
        starts: [num_parts], where each begins in `samples`.
        origins: [num_parts], where each begins in the recording.
    """

    samples: np.ndarray
    starts: np.ndarray
    origins: np.ndarray

    def original(self, sample: float) -> float:
        """The place in the recording of a place in `samples`, both counted in samples."""
        part = max(int(np.searchsorted(self.starts, sample, side="right")) - 1, 0)
        return float(self.origins[part] + sample - self.starts[part])


def without_long_silences(samples: np.ndarray, *, sample_rate: int) -> Condensed:
    """Keep what is loud, with 0.25 s before and after.

    Args:
        samples: [num_samples] of one voice, not empty.
        sample_rate: in Hz.
    """
    levels, frame = _levels(samples, sample_rate)
    num_frames = len(levels)
    width = 2 * round(_MARGIN_SEC / _FRAME_SEC) + 1
    kept = np.convolve(levels > _QUIET * levels.max(), np.ones(width), mode="same")[:num_frames] > 0
    if num_frames < width or not kept.any():
        kept[:] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([0], kept.astype(np.int8), [0]))))
    bounds = np.minimum(edges.reshape(-1, 2) * frame, len(samples))  # [num_parts, 2]
    lengths = bounds[:, 1] - bounds[:, 0]
    parts = [samples[begin:end] for begin, end in bounds]
    return Condensed(np.concatenate(parts), np.cumsum(lengths) - lengths, bounds[:, 0])


def loudest(samples: np.ndarray, *, sample_rate: int) -> float:
    """The greatest root mean square of 10 ms of samples [num_samples]."""
    return float(_levels(samples, sample_rate)[0].max())


def _levels(samples: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """Root mean squares [num_frames], and the samples of a frame."""
    frame = round(_FRAME_SEC * sample_rate)
    num_frames = -(-len(samples) // frame)
    padded = np.pad(samples.astype(np.float64), (0, num_frames * frame - len(samples)))
    return np.sqrt((padded.reshape(num_frames, frame) ** 2).mean(axis=1)), frame
