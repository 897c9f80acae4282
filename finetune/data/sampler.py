"""Which chunks are in which batch, as a pure function of seed, batch number and rank."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GlobalBatchSampler(Sampler[list[int]]):
    """Endless batches of chunk indices for one rank.

    Epoch e visits all chunks in an order drawn from ``(seed, e)``; one epoch follows the other without a gap.
    That sequence is cut into global batches of ``world_size * batch_size`` samples, of which each rank takes
    its slice. So batch size times ranks decides what a step is trained on, however it is split, and a run
    that resumes needs only the number of samples it has seen.
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
    ) -> None:
        """Keeps the settings; every iteration starts at ``start_sample``.

        Args:
            num_chunks: Size of the data set, at least 1; may be smaller than a batch.
            batch_size: Samples per batch and rank.
            rank: This process, from 0.
            world_size: Number of processes.
            seed: Not negative.
            shuffle: Draw a new order for each epoch; otherwise the order of the index.
            start_sample: Samples to skip, over all ranks.

        Raises:
            ValueError: A number is out of its range.
        """
        if num_chunks < 1 or batch_size < 1 or seed < 0 or start_sample < 0:
            raise ValueError(
                f"num_chunks {num_chunks} and batch_size {batch_size} must be at least 1, "
                f"seed {seed} and start_sample {start_sample} at least 0."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, it must be 0 to world_size - 1 = {world_size - 1}.")
        self.num_chunks = num_chunks
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.start_sample = start_sample

    def __iter__(self) -> Iterator[list[int]]:
        """Yields lists of ``batch_size`` chunk indices without end."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        position = self.start_sample + self.rank * self.batch_size
        while True:
            batch = []
            for sample in range(position, position + self.batch_size):
                if sample // self.num_chunks != epoch:
                    epoch = sample // self.num_chunks
                    order = self._epoch_order(epoch)
                batch.append(int(order[sample % self.num_chunks]))
            yield batch
            position += self.world_size * self.batch_size

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.num_chunks, epoch, seed=self.seed, shuffle=self.shuffle)


def epoch_order(size: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """The order of ``size`` things in one epoch, drawn from ``(seed, epoch)``, or as they are."""
    if not shuffle:
        return np.arange(size)
    return np.random.default_rng([seed, epoch]).permutation(size)


def eval_rows(num_chunks: int, *, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """The batches of one rank in one pass over all chunks, which over all ranks come exactly once.

    Rank r has the chunks r, r + world_size, and so on. Ranks have the same number of batches; the last ones
    may be smaller than the others, even empty.
    """
    share = range(rank, num_chunks, world_size)
    num_batches = -(-num_chunks // (world_size * batch_size))
    return [list(share[i * batch_size : (i + 1) * batch_size]) for i in range(num_batches)]
