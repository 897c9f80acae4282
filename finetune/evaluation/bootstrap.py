"""Percentile bootstrap of ratios of sums, such as means: units are drawn with replacement.

Shapes: U units (recordings, or ids of pairs), R resamples.
"""

from collections.abc import Iterator

import numpy as np

from finetune.errors import ConfigError

LEVEL = 0.95  # of the intervals
_BLOCK_ELEMENTS = 2**21  # of the draws that are in use at once
_KEPT_BYTES = 2**28  # of draws for the next interval of as many units


class RatioBootstrap:
    """Intervals of sums of numerators over sums of denominators; the same seed gives the same intervals.

    Args:
        num_resamples: R, draws of as many units as there are.
        seed: of the draws.
    """

    def __init__(self, num_resamples: int = 1000, *, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self._kept: dict[int, list[np.ndarray]] = {}

    def interval(self, numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float] | None:
        """The 95 % interval, None with fewer than two units.

        Memory beside R ratios is bounded, whatever U and R.

        Args:
            numerators, denominators: `[U]`, the latter greater than 0.

        Raises:
            ConfigError: the resamples do not fit into memory.
        """
        num_units = len(numerators)
        if num_units < 2:
            return None
        try:
            ratios = np.empty(self.num_resamples)
            start = 0
            for counts in self._draws(num_units):
                weights = counts.astype(float)
                stop = start + len(weights)
                ratios[start:stop] = (weights @ numerators) / (weights @ denominators)
                start = stop
            low, high = np.percentile(ratios, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
        except MemoryError:
            raise ConfigError(
                f"--resamples: {self.num_resamples} of {num_units} do not fit into memory; take fewer."
            ) from None
        return float(low), float(high)

    def _draws(self, num_units: int) -> Iterator[np.ndarray]:
        """How often each unit is drawn, in blocks `[r, U]` that are R rows together."""
        if num_units in self._kept:
            yield from self._kept[num_units]
            return
        dtype = np.dtype(np.uint16 if num_units < 2**16 else np.uint32)
        num_bytes = self.num_resamples * num_units * dtype.itemsize
        kept = sum(block.nbytes for blocks in self._kept.values() for block in blocks)
        if kept + num_bytes > _KEPT_BYTES:
            self._kept.clear()
        generator = np.random.default_rng(self.seed)
        shares = np.full(num_units, 1 / num_units)
        rows = max(1, _BLOCK_ELEMENTS // num_units)
        blocks = []
        for start in range(0, self.num_resamples, rows):
            size = min(rows, self.num_resamples - start)
            block = generator.multinomial(num_units, shares, size=size).astype(dtype)
            if num_bytes <= _KEPT_BYTES:
                blocks.append(block)
            yield block
        if num_bytes <= _KEPT_BYTES:
            self._kept[num_units] = blocks
