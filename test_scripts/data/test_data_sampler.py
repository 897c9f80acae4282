"""Batches are a function of seed, batch number and rank."""

from itertools import chain, islice

import pytest

from finetune.data.batches.shuffled_sampler import GlobalBatchSampler


def take(count, num_chunks=10, **changes):
    settings = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 3, "shuffle": True} | changes
    return list(islice(GlobalBatchSampler(num_chunks, **settings), count))


@pytest.mark.parametrize("num_chunks", [1, 3, 10, 12, 1000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_together_have_the_batches_of_one_rank(num_chunks, shuffle):
    whole = take(20, num_chunks, batch_size=6, shuffle=shuffle)
    ranks = [take(20, num_chunks, batch_size=2, rank=r, world_size=3, shuffle=shuffle) for r in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("num_chunks", [3, 10, 12])  # smaller than, not a multiple of, a multiple of a batch
def test_every_epoch_has_each_chunk_once(num_chunks):
    samples = list(chain(*take(3 * num_chunks, num_chunks)))
    for epoch in range(3):
        assert sorted(samples[epoch * num_chunks : (epoch + 1) * num_chunks]) == list(range(num_chunks))


def test_epochs_and_seeds_have_different_orders():
    samples = list(chain(*take(50, 100)))
    assert samples[:100] != samples[100:]
    assert take(25, 100) != take(25, 100, seed=4)


def test_without_shuffle_the_order_is_the_index():
    assert take(3, 5, shuffle=False) == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


@pytest.mark.parametrize("skipped", [1, 2, 3, 17])
def test_starting_later_equals_skipping(skipped):
    later = take(5, batch_size=3, rank=1, world_size=2, start_sample=6 * skipped)
    assert later == take(skipped + 5, batch_size=3, rank=1, world_size=2)[skipped:]


def test_another_batch_size_goes_on_where_the_samples_stopped():
    before, after = take(3, batch_size=4), take(6, batch_size=2, start_sample=12)
    assert list(chain(*before, *after)) == list(chain(*take(6, batch_size=4)))


def test_iterating_again_gives_the_same_batches():
    sampler = GlobalBatchSampler(7, batch_size=2, rank=0, world_size=1, seed=0, shuffle=True, start_sample=8)
    assert list(islice(sampler, 9)) == list(islice(sampler, 9))


@pytest.mark.parametrize(
    "bad",
    [
        {"num_chunks": 0},
        {"batch_size": 0},
        {"seed": -1},
        {"start_sample": -1},
        {"rank": 1},
        {"rank": -1},
    ],
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        take(1, **bad)
