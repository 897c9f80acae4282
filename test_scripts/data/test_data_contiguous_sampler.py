"""Rows follow recordings chunk after chunk, however a step is cut into micro-batches, ranks and rows."""

import random
from collections import Counter
from itertools import chain, islice, pairwise

import pytest

from finetune.data.batches.chunks import build_index
from finetune.data.batches.contiguous_sampler import ContiguousBatchSampler, follow_recordings, lane_rows

LENGTHS = (50, 4, 33, 7, 90, 12, 1)  # frames
CHUNKS = build_index(LENGTHS, chunk_frames=4)


def steps(count, **changes):
    """The chunks of each step by lane."""
    settings = {
        "batch_size": 1,
        "num_microbatches": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "shuffle": True,
    } | changes
    batches = list(islice(ContiguousBatchSampler(CHUNKS, **settings), count * settings["num_microbatches"]))
    size = settings["num_microbatches"]
    return [list(chain(*batches[i : i + size])) for i in range(0, len(batches), size)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("lanes", [1, 3, 6, 20])
def test_each_lane_follows_recordings_from_their_first_chunk_to_their_last(lanes, shuffle):
    for lane in zip(*steps(200, batch_size=lanes, shuffle=shuffle), strict=True):
        previous = None
        for index in lane:
            chunk = CHUNKS[index]
            ended = previous is None or (
                previous.start_frame + previous.num_frames == LENGTHS[previous.recording]
            )
            if ended:
                assert chunk.start_frame == 0
            else:
                assert chunk.recording == previous.recording
                assert chunk.start_frame == previous.start_frame + 4
            previous = chunk


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_epoch_visits_every_chunk_once(lanes):
    counts = Counter(chain(*steps(40 * len(CHUNKS), batch_size=lanes)))
    # Lanes are not at the same place when the count stops: one may be an epoch ahead of another.
    assert max(counts.values()) - min(counts.values()) <= (1 if lanes == 1 else 2)
    assert set(counts) == set(range(len(CHUNKS)))


def test_the_split_of_a_step_does_not_matter():
    whole = steps(60, batch_size=4)
    assert steps(60, num_microbatches=4) == whole
    assert steps(60, batch_size=2, num_microbatches=2) == whole
    ranks = [steps(60, num_microbatches=2, rank=rank, world_size=2) for rank in range(2)]
    # Each rank's step has its lane of both micro-batches.
    joined = [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)]
    assert joined == whole


@pytest.mark.parametrize("start_step", [1, 9, 77])
def test_starting_later_equals_skipping(start_step):
    settings = {"batch_size": 2, "num_microbatches": 2}
    assert steps(30, start_step=start_step, **settings) == steps(start_step + 30, **settings)[start_step:]


def test_lanes_are_numbered_as_the_batches_are_made():
    settings = {"batch_size": 2, "num_microbatches": 3}
    rows = [lane_rows(**settings, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(chain(*chain(*rows))) == list(range(12))
    assert rows[1] == [[2, 3], [6, 7], [10, 11]]


def test_shuffling_draws_a_new_order_of_recordings_in_each_epoch():
    def order(seed):
        visited = [CHUNKS[index[0]] for index in steps(2 * len(CHUNKS), seed=seed)]
        return [chunk.recording for chunk in visited if chunk.start_frame == 0]

    first, second = order(3)[: len(LENGTHS)], order(3)[len(LENGTHS) :]
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS)))
    assert first != second and order(4)[: len(LENGTHS)] != first


def random_layout(seed):
    """A manifest, the length of a chunk and a split into rows and processes."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
    split = {"batch_size": draw.randint(1, 4), "world_size": draw.randint(1, 3)}
    return build_index(lengths, chunk_frames=draw.randint(1, 17)), lengths, split, draw


def frames_of(chunks):
    """Recording and frame of every frame, in the order in which they are heard."""
    return [
        (chunk.recording, frame)
        for chunk in chunks
        for frame in range(chunk.start_frame, chunk.start_frame + chunk.num_frames)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_one_pass_hears_every_frame_once_and_each_recording_in_order(seed):
    chunks, lengths, split, _ = random_layout(seed)
    ranks = [follow_recordings(chunks, rank=rank, **split) for rank in range(split["world_size"])]
    lanes = {}
    for pairs in chain(*chain(*ranks)):
        lanes.setdefault(pairs[0], []).append(chunks[pairs[1]])
    heard = {lane: frames_of(visited) for lane, visited in lanes.items()}
    everything = sorted(chain(*heard.values()))
    assert everything == [(i, frame) for i, length in enumerate(lengths) for frame in range(length)]
    for frames in heard.values():
        # Each recording in one piece: the next frame follows, or another recording starts.
        for (recording, frame), following in pairwise(frames):
            assert following == (recording, frame + 1) or following[1] == 0
    assert len({len(batches) for batches in ranks}) == 1


@pytest.mark.parametrize("seed", range(25))
def test_an_epoch_of_training_hears_every_frame_once_and_each_recording_in_order(seed):
    chunks, lengths, split, draw = random_layout(seed)
    num_microbatches = draw.randint(1, 3)
    samplers = [
        ContiguousBatchSampler(
            chunks, num_microbatches=num_microbatches, rank=rank, seed=seed, shuffle=seed % 2 == 0, **split
        )
        for rank in range(split["world_size"])
    ]
    lanes = {}  # by rank, micro-batch and row
    for rank, sampler in enumerate(samplers):
        for number, batch in enumerate(islice(sampler, len(chunks) * num_microbatches)):
            for row, index in enumerate(batch):
                lanes.setdefault((rank, number % num_microbatches, row), []).append(chunks[index])
    visits = Counter()
    for visited in lanes.values():
        for previous, chunk in zip([None, *visited], visited, strict=False):
            if previous is None or previous.start_frame + previous.num_frames == lengths[previous.recording]:
                assert chunk.start_frame == 0
                visits[chunk.recording] += 1
            else:
                assert chunk.recording == previous.recording
                assert chunk.start_frame == previous.start_frame + previous.num_frames
    # After so many steps every recording was begun: an epoch hands out each of them once.
    assert set(visits) == set(range(len(lengths)))
    assert max(visits.values()) - min(visits.values()) <= 1


def test_long_and_short_recordings_balance():
    lengths = [100, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    chunks = build_index(lengths, chunk_frames=10)
    assert len(follow_recordings(chunks, batch_size=2, rank=0, world_size=1)) == 10
