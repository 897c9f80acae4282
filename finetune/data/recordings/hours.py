"""So many hours of each source, its recordings drawn by the seed: `data.max_hours`."""

import logging
import math
import random
from collections.abc import Sequence

from finetune.data.recordings.recording import Recording
from finetune.data.recordings.sources import DataSource
from finetune.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

KEY = "data.max_hours"


def limits_of(
    max_hours: float | list[float | None] | None, sources: Sequence[DataSource]
) -> list[float | None]:
    """The most hours of each source; None where all of it is taken.

    Args:
        max_hours: one number is that of each source.
        sources: of `data.train_data`.

    Raises:
        ConfigError: there are not as many numbers as sources.
    """
    if not isinstance(max_hours, list):
        return [max_hours] * len(sources)
    if len(max_hours) != len(sources):
        raise ConfigError(
            f"{KEY}: {len(max_hours)} numbers for {len(sources)} sources of data.train_data; give one for "
            "each (null: all of it), or a single number for all."
        )
    return max_hours


def take_hours(
    recordings: Sequence[Recording],
    sources: Sequence[DataSource],
    limits: Sequence[float | None],
    *,
    seed: int,
) -> list[Recording]:
    """Choose recordings of each source up to its hours, and log what was taken.

    The recordings of a source are drawn one after the other, and each that still fits is taken. What is drawn
    depends on the seed, the source's place and its recordings, and not on the limit or on other sources.

    Args:
        recordings: of all sources; `source` is their place.
        sources: by their place.
        limits: of `limits_of`.
        seed: of the run.

    Returns:
        The chosen ones in the order of `recordings`.

    Raises:
        DataError: not one recording of a source is short enough.
    """
    chosen: set[int] = set()
    for place, (source, limit) in enumerate(zip(sources, limits, strict=True)):
        numbers = [number for number, recording in enumerate(recordings) if recording.source == place]
        if limit is not None:
            lengths = {number: recordings[number].duration_sec for number in numbers}
            numbers = _draw(lengths, 3600 * limit, random.Random(f"{seed} {place}"))
            _report(source, limit, lengths, numbers)
        chosen |= set(numbers)
    return [recording for number, recording in enumerate(recordings) if number in chosen]


def _draw(lengths: dict[int, float], limit_sec: float, generator: random.Random) -> list[int]:
    drawn = list(lengths)
    generator.shuffle(drawn)
    taken: list[int] = []
    left = limit_sec * (1 + 1e-9)  # sums of what adds up to the limit are rounded
    for number in drawn:
        if lengths[number] <= left:
            taken.append(number)
            left -= lengths[number]
    return taken


def _report(source: DataSource, limit: float, lengths: dict[int, float], taken: Sequence[int]) -> None:
    if lengths and not taken:
        raise DataError(
            f"{KEY}: {limit:g} h of {source.path} are less than its shortest recording, "
            f"{min(lengths.values()):g} s; give more."
        )
    logger.info(
        "%s: %d of %d recordings of %s, %.2f of %.2f h, drawn by the seed.",
        KEY,
        len(taken),
        len(lengths),
        source.path,
        math.fsum(lengths[number] for number in taken) / 3600,
        math.fsum(lengths.values()) / 3600,
    )
