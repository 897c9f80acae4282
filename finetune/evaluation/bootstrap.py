"""Percentile bootstrap of ratios of sums, such as means: units are drawn with replacement.

Shapes: U units (recordings, or ids of pairs).
"""

import numpy as np

LEVEL = 0.95  # of the intervals


class RatioBootstrap:
    """Intervals of sums of numerators over sums of denominators; the same seed gives the same intervals.

    Args:
        num_resamples: draws of as many units as there are.
        seed: of the draws.
    """

    def __init__(self, num_resamples: int = 1000, *, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self._weights: dict[int, np.ndarray] = {}

    def interval(self, numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float] | None:
        """The 95 % interval, None with fewer than two units.

        Args:
            numerators, denominators: `[U]`, the latter greater than 0.
        """
        if len(numerators) < 2:
            return None
        weights = self._draws(len(numerators))
        ratios = (weights @ numerators) / (weights @ denominators)
        low, high = np.percentile(ratios, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
        return float(low), float(high)

    def _draws(self, num_units: int) -> np.ndarray:
        """How often each unit is drawn, `[num_resamples, U]`."""
        if num_units not in self._weights:
            generator = np.random.default_rng(self.seed)
            shares = np.full(num_units, 1 / num_units)
            draws = generator.multinomial(num_units, shares, size=self.num_resamples)
            self._weights[num_units] = draws.astype(float)
        return self._weights[num_units]
