"""Which of several weighted sources comes next, so that the shares of what is trained on are the weights."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One source among others.

    Attributes:
        size: its things: chunks, or recordings; they follow those of the sources before it.
        weight: its share of the chunks trained on, relative to those of the others.
    """

    size: int
    weight: float = 1.0


class SourceMixer:
    """Names the source that is furthest behind its share, by the method of Webster and Sainte-Laguë.

    A source with weight w that has had n chunks stands at `(n + 0.5) / w`, and the lowest is next. So after
    any number N of single chunks a source is less than one chunk per source away from `w * N`.
    """

    def __init__(self, weights: Sequence[float], *, after: int = 0) -> None:
        """Start after a number of single chunks, without going through them.

        Args:
            weights: of the sources, above 0, in total 1.
            after: chunks that have been handed out one by one.
        """
        self._weights = tuple(weights)
        self.counts = [0] * len(weights)
        # Whoever stands below this line comes before whoever stands above it, and that many have not passed.
        line = after - len(weights) - 1
        for source in range(len(weights)):
            self.counts[source] = self._passed(source, line)
        while sum(self.counts) < after:
            self.add(self.next_source(), 1)

    def next_source(self) -> int:
        """The source that is furthest behind, of equal ones the first."""
        return min(range(len(self._weights)), key=lambda source: self._stand(source, self.counts[source]))

    def add(self, source: int, num_chunks: int) -> None:
        """Note that chunks of a source have been handed out."""
        self.counts[source] += num_chunks

    def _stand(self, source: int, count: int) -> float:
        return (count + 0.5) / self._weights[source]

    def _passed(self, source: int, line: float) -> int:
        """How many chunks a source has had when it first stands above a line."""
        count = max(0, int(self._weights[source] * line))
        while count and self._stand(source, count - 1) > line:
            count -= 1
        while self._stand(source, count) <= line:
            count += 1
        return count


def normalised(shares: Sequence[Share]) -> list[float]:
    """The weights, in total 1.

    Raises:
        ValueError: there is no share, or one has no size or weight.
    """
    if not shares or any(share.size < 1 or not share.weight > 0 for share in shares):
        raise ValueError(f"shares must have sizes of at least 1 and weights above 0, not {list(shares)}.")
    total = sum(share.weight for share in shares)
    return [share.weight / total for share in shares]
