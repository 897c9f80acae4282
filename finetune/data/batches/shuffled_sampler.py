"""Which chunks are in which batch, as a pure function of seed, batch number and rank."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Sampler

from finetune.data.batches.mixing import Share, SourceMixer, normalised


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless batches of chunk indices for one rank.

    Epoch e visits all chunks in an order drawn from `(seed, e)`; one epoch follows the other without a gap.
    That sequence is cut into global batches of `world_size * batch_size` samples, of which each rank takes
    its slice. So batch size times ranks decides what a step is trained on, however it is split, and a run
    that resumes needs only the number of samples it has seen. Of several sources each has its own epochs.
    """

    def __init__(
        self,
        num_chunks: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        start_sample: int = 0,
        shares: Sequence[Share] | None = None,
    ) -> None:
        """Keep the settings; every iteration starts at `start_sample`.

        Args:
            num_chunks: size of the data set, at least 1; may be smaller than a batch.
            batch_size: samples per batch and rank.
            rank: this process, from 0.
            world_size: number of processes.
            seed: not negative.
            shuffle: draw a new order for each epoch; otherwise the order of the index.
            start_sample: samples to skip, over all ranks.
            shares: chunks and weights of the sources that the chunks come from, one after the other; None
                means one source.

        Raises:
            ValueError: a number is out of its range.
        """
        if num_chunks < 1 or batch_size < 1 or seed < 0 or start_sample < 0:
            raise ValueError(
                f"num_chunks {num_chunks} and batch_size {batch_size} must be at least 1, "
                f"seed {seed} and start_sample {start_sample} at least 0."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, it must be 0 to world_size - 1 = {world_size - 1}.")
        self.shares = [Share(num_chunks)] if shares is None else list(shares)
        if sum(share.size for share in self.shares) != num_chunks:
            raise ValueError(f"shares hold other than num_chunks = {num_chunks} chunks.")
        self._weights = normalised(self.shares)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.start_sample = start_sample

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of `batch_size` chunk indices without end."""
        sequence = self._sequence()
        while True:
            batch = [next(sequence) for _ in range(self.world_size * self.batch_size)]
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _sequence(self) -> Iterator[int]:
        """Yield the chunks of all ranks one by one."""
        mixer = SourceMixer(self._weights, after=self.start_sample)
        first_chunk = [0, *accumulate(share.size for share in self.shares)]
        orders: dict[int, tuple[int, np.ndarray]] = {}
        while True:
            source = mixer.next_source()
            epoch, position = divmod(mixer.counts[source], self.shares[source].size)
            mixer.add(source, 1)
            if source not in orders or orders[source][0] != epoch:
                size = self.shares[source].size
                order = epoch_order(size, epoch, seed=self.seed, shuffle=self.shuffle, source=source)
                orders[source] = epoch, order
            yield first_chunk[source] + int(orders[source][1][position])


def epoch_order(size: int, epoch: int, *, seed: int, shuffle: bool, source: int = 0) -> np.ndarray:
    """The order of `size` things in one epoch of a source, drawn from all three numbers, or as they are."""
    if not shuffle:
        return np.arange(size)
    return np.random.default_rng([seed, epoch, source]).permutation(size)


def eval_rows(num_chunks: int, *, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The batches of one rank in one pass over all chunks, which over all ranks come exactly once.

    Rank r has the chunks r, r + world_size, and so on. Ranks have the same number of batches; the last ones
    may be smaller than the others, even empty.
    """
    share = range(rank, num_chunks, world_size)
    num_batches = -(-num_chunks // (world_size * batch_size))
    return [list(share[i * batch_size : (i + 1) * batch_size]) for i in range(num_batches)]
