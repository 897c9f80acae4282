"""Means around positions, slopes and differences of losses along recordings, with bootstrap intervals.

Every statistic here is a sum over recordings divided by another: a mean is losses over their number, a
least-squares slope is covariance over variance. Intervals come from drawing recordings with replacement.

Shapes: R recordings, N_r frames of recording r. Losses are in nats, NaN where a frame has no target.
Positions are frames from the start of a recording, 12.5 a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune.evaluation.bootstrap import RatioBootstrap

THIRDS = ("early", "middle", "late")
ONE_RECORDING = "no interval: it would need at least two recordings"
_FRAMES_PER_UNIT = 1000  # of a slope


class Estimate(NamedTuple):
    """A statistic over the recordings that have frames for it; None where none has.

    Attributes:
        value: in nats, or nats per 1,000 frames.
        interval: 95 % bootstrap interval over recordings, None with fewer than two.
        num_frames: targets that it is made of.
        num_recordings: that contribute.
    """

    value: float | None
    interval: tuple[float, float] | None
    num_frames: int
    num_recordings: int


class Ratio(NamedTuple):
    """Numerators and denominators of a statistic, one per recording, and their numbers of frames, `[R]`."""

    numerators: np.ndarray
    denominators: np.ndarray
    counts: np.ndarray


class Bootstrap(RatioBootstrap):
    """Estimates of ratios with intervals over recordings."""

    def estimate(self, ratio: Ratio) -> Estimate:
        """Sum of numerators over sum of denominators, over the recordings that have any."""
        used = ratio.denominators > 0
        numerators, denominators = ratio.numerators[used], ratio.denominators[used]
        num_frames, num_recordings = int(ratio.counts[used].sum()), int(used.sum())
        if num_recordings == 0:
            return Estimate(None, None, 0, 0)
        value = float(numerators.sum() / denominators.sum())
        return Estimate(value, self.interval(numerators, denominators), num_frames, num_recordings)


@dataclass(frozen=True)
class Window:
    """Frames around a position.

    Attributes:
        centre: frames from the start of a recording.
        half_width: frames to either side; the window is cut off at the recording's start and end.
    """

    centre: int
    half_width: int

    @property
    def name(self) -> str:
        """`librilight_8k` for 8,000 frames."""
        thousands, rest = divmod(self.centre, 1000)
        return f"librilight_{self.centre if rest else f'{thousands}k'}"

    def losses_of(self, losses: np.ndarray) -> np.ndarray:
        """The losses inside; none of a recording that ends before the centre."""
        if len(losses) < self.centre:
            return losses[:0]
        return losses[max(self.centre - self.half_width, 0) : self.centre + self.half_width]


def window_ratio(recordings: Sequence[np.ndarray], window: Window) -> Ratio:
    """The mean loss of the frames in a window."""
    return mean_ratio([window.losses_of(losses) for losses in recordings])


def mean_ratio(recordings: Sequence[np.ndarray]) -> Ratio:
    """The mean loss of all frames."""
    counts = np.array([np.isfinite(losses).sum() for losses in recordings], dtype=float)
    sums = np.array([np.nansum(losses, dtype=float) for losses in recordings], dtype=float)
    return Ratio(sums, counts, counts)


def slope_ratio(recordings: Sequence[np.ndarray], start: int, stop: int) -> Ratio:
    """The least-squares slope of losses over positions `start` to `stop`, in nats per 1,000 frames.

    Each recording has an intercept of its own, so that where a short one ends the line does not bend.
    """
    rows = [_slope_sums(losses[start:stop], start) for losses in recordings]
    covariances, variances, counts = np.array(rows, dtype=float).reshape(-1, 3).T
    return Ratio(covariances, variances, counts)


def thirds(num_frames: int) -> dict[str, tuple[int, int]]:
    """The first, second and last third of so many frames, by name."""
    edges = [round(num_frames * part / len(THIRDS)) for part in range(len(THIRDS) + 1)]
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(THIRDS)}


def differences(ours: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Loss by loss, of two lists of the same recordings."""
    return [a - b for a, b in zip(ours, others, strict=True)]


def bin_ratios(recordings: Sequence[np.ndarray], bin_frames: int) -> list[Ratio]:
    """The mean loss of each bin of so many positions, up to the end of the longest recording."""
    longest = max((len(losses) for losses in recordings), default=0)
    return [
        mean_ratio([losses[start : start + bin_frames] for losses in recordings])
        for start in range(0, longest, bin_frames)
    ]


def _slope_sums(losses: np.ndarray, start: int) -> tuple[float, float, int]:
    has_target = np.isfinite(losses)
    count = int(has_target.sum())
    if count < 2:
        return 0.0, 0.0, 0
    x = (np.flatnonzero(has_target) + start) / _FRAMES_PER_UNIT
    y = losses[has_target].astype(float)
    x = x - x.mean()
    return float(x @ (y - y.mean())), float(x @ x), count
