"""Levels of a recording's channels over its length, gathered piece by piece."""

from dataclasses import dataclass

import numpy as np

WINDOW_SEC = 0.02
SILENCE_DBFS = -60.0
SILENT_SHARE = 0.999
# The largest value that 16 bits have.
FULL_SCALE = 32767 / 32768
CLIPPED_SHARE = 1e-3
# A voice is heard where a channel is at most so much below its loud moments.
VOICE_RANGE_DB = 30.0
_LEAST_POWER = 1e-20  # digital silence has a level, too: -200 dBFS


@dataclass(frozen=True)
class Levels:
    """What a recording's channels sound like.

    Attributes:
        num_samples: per channel.
        dbfs: RMS level of each window of 20 ms in dB of full scale, `[channels, windows]`.
        clipped: samples of each channel at full scale, `[channels]`.
    """

    num_samples: int
    dbfs: np.ndarray
    clipped: np.ndarray

    def silent_share(self, channel: int) -> float:
        """Share of the time in which a channel is silent."""
        return float(np.mean(self.dbfs[channel] < SILENCE_DBFS))

    def clipped_share(self, channel: int) -> float:
        """Share of a channel's samples at full scale."""
        return float(self.clipped[channel] / self.num_samples)

    def voiced(self, channel: int) -> np.ndarray:
        """In which windows a voice is heard on a channel, bool `[windows]`."""
        dbfs = self.dbfs[channel]
        loud = np.percentile(dbfs, 95)
        return (dbfs >= SILENCE_DBFS) & (dbfs >= loud - VOICE_RANGE_DB)


class LevelMeter:
    """Takes pieces of a recording and keeps 50 numbers per second and channel.

    Args:
        channels: of the recording.
        sample_rate: samples per second.
    """

    def __init__(self, channels: int, sample_rate: int) -> None:
        self._window = max(1, round(sample_rate * WINDOW_SEC))
        self._num_samples = 0
        self._clipped = np.zeros(channels, np.int64)
        self._rest: np.ndarray = np.zeros((channels, 0), np.float32)
        self._power: list[np.ndarray] = []

    @property
    def num_samples(self) -> int:
        """Taken so far, per channel."""
        return self._num_samples

    def add(self, samples: np.ndarray) -> None:
        """Take the next piece, `[channels, n]`, finite."""
        self._num_samples += samples.shape[1]
        self._clipped += (np.abs(samples) >= FULL_SCALE).sum(axis=1)
        samples = np.concatenate([self._rest, samples], axis=1)
        whole = samples.shape[1] // self._window * self._window
        self._add_power(samples[:, :whole].reshape(len(samples), -1, self._window))
        self._rest = samples[:, whole:].copy()

    def finish(self) -> Levels:
        """The levels of all that was taken, at least one sample."""
        if self._rest.shape[1]:
            self._add_power(self._rest[:, None])
        power = np.maximum(np.concatenate(self._power, axis=1), _LEAST_POWER)
        dbfs = 10 * np.log10(power)
        return Levels(self._num_samples, dbfs, self._clipped)

    def _add_power(self, windows: np.ndarray) -> None:
        # float32 samples of a damaged float file may have squares beyond float32.
        self._power.append(np.mean(np.square(windows, dtype=np.float64), axis=2))
