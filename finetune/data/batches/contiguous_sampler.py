"""Batches whose rows follow recordings chunk after chunk, so that memory can be carried along."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

from torch.utils.data import Sampler

from finetune.data.batches.chunks import Chunk
from finetune.data.batches.mixing import Share, SourceMixer, normalised
from finetune.data.batches.shuffled_sampler import epoch_order


class ContiguousBatchSampler(Sampler[list[int]]):
    """Endless micro-batches of chunk indices for one rank, a pure function of seed, step and lane.

    A step trains on `num_microbatches * world_size * batch_size` chunks, one of each *lane*; lane
    `(micro_batch * world_size + rank) * batch_size + row` is always the same row of the same micro-batch.
    Each lane follows one recording from its first chunk to its last and then takes the next recording of
    the epoch, so that long and short recordings balance and every epoch visits every chunk once. The lanes
    depend on their number only, not on how it is split into micro-batches, ranks and rows. Of several
    sources, each with its own epochs, the next recording is one of the source furthest behind its share of
    the chunks.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        *,
        batch_size: int,
        num_microbatches: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        start_step: int = 0,
        shares: Sequence[Share] | None = None,
    ) -> None:
        """Keep the settings; every iteration starts at `start_step`.

        Args:
            chunks: by recording, then by time, as `build_index` lists them; at least one.
            batch_size: rows per micro-batch and rank.
            num_microbatches: micro-batches per step.
            rank: this process, from 0.
            world_size: number of processes.
            seed: not negative.
            shuffle: draw a new order of the recordings for each epoch.
            start_step: steps to skip.
            shares: recordings and weights of the sources that they come from, one after the other; None means
                one source.

        Raises:
            ValueError: `shares` do not fit the recordings.
        """
        self._recordings = _chunks_of_recordings(chunks)
        self._shares = [Share(len(self._recordings))] if shares is None else list(shares)
        if sum(share.size for share in self._shares) != len(self._recordings):
            raise ValueError(f"shares hold other than {len(self._recordings)} recordings.")
        self._weights = normalised(self._shares)
        self.num_lanes = num_microbatches * world_size * batch_size
        self._rows = lane_rows(batch_size, num_microbatches, rank, world_size)
        self._seed, self._shuffle, self._start_step = seed, shuffle, start_step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the micro-batches of one step after the other, without end."""
        visits = self._visits()
        free = [(0, lane) for lane in range(self.num_lanes)]  # when each lane has finished its recording
        first_chunk = [0] * self.num_lanes
        started = [0] * self.num_lanes
        step = self._start_step
        while True:
            while free[0][0] <= step:
                now, lane = free[0]
                first_chunk[lane], count = next(visits)
                started[lane] = now
                heapq.heapreplace(free, (now + count, lane))
            for lanes in self._rows:
                yield [first_chunk[lane] + step - started[lane] for lane in lanes]
            step += 1

    def _visits(self) -> Iterator[tuple[int, int]]:
        """Yield first chunk and number of chunks of the recordings in the order in which they start."""
        firsts = [0, *accumulate(share.size for share in self._shares)]
        sources = [self._visits_of(source, firsts[source]) for source in range(len(self._shares))]
        mixer = SourceMixer(self._weights)
        while True:
            source = mixer.next_source()
            visit = next(sources[source])
            mixer.add(source, visit[1])
            yield visit

    def _visits_of(self, source: int, first: int) -> Iterator[tuple[int, int]]:
        size, epoch = self._shares[source].size, 0
        while True:
            order = epoch_order(size, epoch, seed=self._seed, shuffle=self._shuffle, source=source)
            yield from (self._recordings[first + index] for index in order)
            epoch += 1


def lane_rows(batch_size: int, num_microbatches: int, rank: int, world_size: int) -> list[list[int]]:
    """The lanes of this rank's rows, by micro-batch."""
    return [
        [(micro * world_size + rank) * batch_size + row for row in range(batch_size)]
        for micro in range(num_microbatches)
    ]


def follow_recordings(
    chunks: Sequence[Chunk], *, batch_size: int, rank: int, world_size: int
) -> list[list[tuple[int, int]]]:
    """One pass over all chunks in which each lane follows recordings from their first to their last chunk.

    The longest recordings are dealt first, each to the lane with the least to do.

    Args:
        chunks: by recording, then by time.
        batch_size: lanes per rank.
        rank: this process, from 0.
        world_size: number of processes.

    Returns:
        Pairs of lane and chunk index of each batch of this rank. Ranks have the same number of batches; those
        of lanes that have nothing left to do are smaller, even empty.
    """
    lanes: list[list[int]] = [[] for _ in range(batch_size * world_size)]
    free = [(0, lane) for lane in range(len(lanes))]
    for first, count in sorted(_chunks_of_recordings(chunks), key=lambda part: -part[1]):
        length, lane = free[0]
        lanes[lane] += range(first, first + count)
        heapq.heapreplace(free, (length + count, lane))
    own = range(rank * batch_size, (rank + 1) * batch_size)
    num_batches = max(map(len, lanes))
    return [[(lane, lanes[lane][i]) for lane in own if i < len(lanes[lane])] for i in range(num_batches)]


def _chunks_of_recordings(chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
    """First chunk and number of chunks of each recording."""
    recordings, first = [], 0
    for _, group in groupby(chunks, key=lambda chunk: chunk.recording):
        count = len(list(group))
        recordings.append((first, count))
        first += count
    return recordings
