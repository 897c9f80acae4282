"""Which manifests are trained on, and in which shares: `a.jsonl:0.7,b.jsonl:0.3`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import DataError


@dataclass(frozen=True)
class DataSource:
    """A manifest or a folder of manifests.

    Attributes:
        path: it; nothing has looked whether it exists.
        weight: its share, relative to those of the others; None when no shares are given.
    """

    path: Path
    weight: float | None = None


def parse_sources(text: str, *, key: str) -> list[DataSource]:
    """Read one source or several, separated by commas, each with `:weight` or none.

    An existing path is taken as it is, whatever characters it has.

    Args:
        text: as the configuration has it.
        key: configuration key or option that held it, for messages.

    Returns:
        The sources in their order; the weights add up to 1.

    Raises:
        DataError: a part is empty, a weight is no finite number above 0, or only some parts have one.
    """
    sources = [_parse_part(part, key=key) for part in _split(text, key=key)]
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return sources
    if len(weights) < len(sources):
        bare = next(source for source in sources if source.weight is None)
        weighted = next(source for source in sources if source.weight is not None)
        raise DataError(
            f"{key}: {bare.path} has no weight and {weighted.path} has one; give all of them a weight "
            "('a.jsonl:0.7,b.jsonl:0.3') or none."
        )
    # The largest first: the sum of finite weights may be infinite.
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    shares = [weight / largest / total for weight in weights]
    if min(shares) <= 0:
        raise DataError(f"{key}: {text}: a weight is too small beside the others to ever be trained on.")
    return [DataSource(source.path, share) for source, share in zip(sources, shares, strict=True)]


def refuse_weights(sources: Sequence[DataSource], *, key: str) -> None:
    """Raise DataError where sources have weights that would mean nothing."""
    for source in sources:
        if source.weight is not None:
            raise DataError(
                f"{key}: {source.path} has a weight, but each recording is evaluated once; leave weights out."
            )


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have
        return False


def _split(text: str, *, key: str) -> list[str]:
    """Cut at commas that do not belong to an existing path, the longest one first."""
    pieces = text.split(",")
    parts = []
    start = 0
    while start < len(pieces):
        stop = start + 1
        for end in range(len(pieces), start, -1):
            candidate = ",".join(pieces[start:end]).strip()
            if _exists(candidate) or _exists(candidate.rpartition(":")[0].strip()):
                stop = end
                break
        part = ",".join(pieces[start:stop]).strip()
        if not part:
            raise DataError(f"{key}: {text!r} has an empty part; write 'a.jsonl,b.jsonl'.")
        parts.append(part)
        start = stop
    return parts


def _parse_part(part: str, *, key: str) -> DataSource:
    path, colon, weight_text = part.rpartition(":")
    path = path.strip()
    if _exists(part) or not colon:
        return DataSource(Path(part))
    try:
        weight = float(weight_text)
    except ValueError:
        if not _exists(path):
            return DataSource(Path(part))  # whose reader will say that it does not exist
        weight = math.nan
    if not path or not 0 < weight < math.inf:
        raise DataError(f"{key}: {part}: the weight must be a finite number above 0, as in 'a.jsonl:0.7'.")
    return DataSource(Path(path), weight)
