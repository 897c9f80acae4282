"""Several sources with shares: how they are written, and how often each is trained on."""

import logging
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest

from finetune.args import TrainArgs
from finetune.config_io import build_args
from finetune.data.batches.chunks import Chunk
from finetune.data.batches.contiguous_sampler import ContiguousBatchSampler
from finetune.data.batches.mixing import Share, SourceMixer, normalised
from finetune.data.batches.shuffled_sampler import GlobalBatchSampler
from finetune.data.pipeline import load_recordings
from finetune.data.recordings.hours import limits_of, take_hours
from finetune.data.recordings.recording import Recording
from finetune.data.recordings.sources import DataSource, parse_sources
from finetune.errors import ConfigError, DataError

KEY = "data.train_data"
WEIGHTS = (0.7, 0.2, 0.1)


def parse(text):
    return [(str(source.path), source.weight) for source in parse_sources(text, key=KEY)]


def test_sources_are_separated_by_commas_and_shares_add_up_to_one():
    assert parse("a.jsonl") == [("a.jsonl", None)]
    assert parse("a.jsonl, dir") == [("a.jsonl", None), ("dir", None)]
    assert parse("a.jsonl:3 , dir:1") == [("a.jsonl", 0.75), ("dir", 0.25)]
    assert parse("a.jsonl:1e308,b:1e308") == [("a.jsonl", 0.5), ("b", 0.5)]


def test_what_exists_is_taken_as_it_is(tmp_path):
    for name in ("a,b.jsonl", "c:0.5", "d"):
        (tmp_path / name).mkdir()
    comma, colon, plain = f"{tmp_path}/a,b.jsonl", f"{tmp_path}/c:0.5", f"{tmp_path}/d"
    assert parse(comma) == [(comma, None)]
    assert parse(f"{colon},{plain}") == [(colon, None), (plain, None)]
    assert parse(f"{comma}:1,{colon}:3") == [(comma, 0.25), (colon, 0.75)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0.5,b", "b has no weight and a has one; give all of them a weight"),
        ("a:0,b:1", "a:0: the weight must be a finite number above 0"),
        ("a:-1,b:1", "a:-1: the weight must be"),
        ("a:nan,b:1", "a:nan: the weight must be"),
        ("a:inf,b:1", "a:inf: the weight must be"),
        ("a,,b", "has an empty part"),
        (":0.5", "the weight must be"),
        ("a:1e-320,b:1e300", "too small beside the others"),
    ],
)
def test_shares_that_mean_nothing_are_one_line(text, message):
    with pytest.raises(DataError, match=rf"^{KEY}: .*{message}") as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("after", [0, 1, 7, 100, 12_345])
def test_a_mixer_may_start_anywhere(after):
    mixer = SourceMixer(WEIGHTS)
    for _ in range(after):
        mixer.add(mixer.next_source(), 1)
    assert SourceMixer(WEIGHTS, after=after).counts == mixer.counts


def test_after_any_number_of_chunks_each_source_has_had_its_share():
    mixer = SourceMixer(WEIGHTS)
    for number in range(1, 2001):
        mixer.add(mixer.next_source(), 1)
        assert all(
            abs(count - w * number) < len(WEIGHTS) for count, w in zip(mixer.counts, WEIGHTS, strict=True)
        )


def test_shares_without_size_or_weight_are_refused():
    for shares in ([], [Share(0, 1.0)], [Share(3, 0.0)], [Share(3, float("nan"))]):
        with pytest.raises(ValueError, match="shares must have"):
            normalised(shares)


SIZES = (5, 40, 11)
SHARES = [Share(size, weight) for size, weight in zip(SIZES, WEIGHTS, strict=True)]


def source_of(chunk):
    return 0 if chunk < SIZES[0] else 1 if chunk < SIZES[0] + SIZES[1] else 2


def take(count, **changes):
    settings = {"batch_size": 4, "rank": 0, "world_size": 1, "seed": 3, "shuffle": True, "shares": SHARES}
    return list(islice(GlobalBatchSampler(sum(SIZES), **(settings | changes)), count))


def test_chunks_in_any_order_come_by_their_sources_shares():
    counts = Counter(map(source_of, chain(*take(250))))
    assert [counts[source] for source in range(3)] == pytest.approx([700, 200, 100], abs=3)


def test_each_source_has_epochs_of_its_own():
    samples = list(chain(*take(250)))
    for source, size in enumerate(SIZES):
        own = [chunk for chunk in samples if source_of(chunk) == source]
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert epochs and all(len(set(epoch)) == size for epoch in epochs)
        assert len(epochs) == 1 or epochs[0] != epochs[1]


def test_shares_do_not_depend_on_ranks_nor_on_where_a_run_starts():
    whole = take(30, batch_size=6)
    ranks = [take(30, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert take(10, batch_size=6, start_sample=120) == whole[20:]


def recordings_of(lengths):
    return [Chunk(r, 8 * i, 8) for r, length in enumerate(lengths) for i in range(length)]


LENGTHS = (
    3,
    1,
    12,
    2,
    7,
    1,
    1,
    30,
)  # chunks of each recording: three of the first source, five of the second
CHUNKS = recordings_of(LENGTHS)


def follow(count, **changes):
    settings = {
        "batch_size": 2,
        "num_microbatches": 2,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "shuffle": True,
    }
    settings["shares"] = [Share(3, 0.75), Share(5, 0.25)]
    return list(islice(ContiguousBatchSampler(CHUNKS, **(settings | changes)), count))


def test_recordings_that_rows_follow_come_by_shares_of_their_chunks():
    samples = list(chain(*follow(2000)))
    first = sum(CHUNKS[chunk].recording < 3 for chunk in samples)
    # Begun recordings count as a whole at once: four rows may each have one of 30 chunks before them.
    assert first / len(samples) == pytest.approx(0.75, abs=4 * 30 / len(samples))


def steps(count, **changes):
    """The chunks of all rows of one step after the other."""
    ranks = [
        follow(count * changes["num_microbatches"], rank=r, **changes) for r in range(changes["world_size"])
    ]
    return [
        [
            chunk
            for m in range(changes["num_microbatches"])
            for rank in ranks
            for chunk in rank[step * changes["num_microbatches"] + m]
        ]
        for step in range(count)
    ]


@pytest.mark.parametrize("split", [(2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1)], ids=str)
def test_rows_of_shared_sources_depend_on_their_number_only(split):
    batch_size, num_microbatches, world_size = split
    settings = {"batch_size": batch_size, "num_microbatches": num_microbatches, "world_size": world_size}
    whole = steps(60, batch_size=4, num_microbatches=1, world_size=1)
    assert steps(60, **settings) == whole
    assert steps(20, start_step=40, **settings) == whole[40:]


def test_shares_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match="shares hold other than"):
        take(1, shares=[Share(5, 1.0)])
    with pytest.raises(ValueError, match="shares hold other than"):
        follow(1, shares=[Share(5, 1.0)])


def recordings_of(*lengths_of_sources):
    """Recordings of several sources, by their lengths in seconds."""
    return [
        Recording(Path(f"{source}/{number}.wav"), float(sec), Path(f"{source}/{number}.json"), source=source)
        for source, lengths in enumerate(lengths_of_sources)
        for number, sec in enumerate(lengths)
    ]


def take_within(recordings, *limits, seed=0):
    sources = [DataSource(Path(f"{place}.jsonl")) for place in range(len(limits))]
    return take_hours(recordings, sources, limits, seed=seed)


LENGTHS = [60 + 7 * number for number in range(40)]


def test_hours_of_a_source_are_drawn_by_the_seed_and_nearly_filled():
    recordings = recordings_of(LENGTHS)
    taken = take_within(recordings, 0.5)
    total = sum(recording.duration_sec for recording in taken)
    assert 1800 - min(LENGTHS) < total <= 1800
    assert taken == [recording for recording in recordings if recording in taken]  # in the manifest's order
    assert take_within(recordings, 0.5) == taken != take_within(recordings, 0.5, seed=1)
    assert take_within(recordings, sum(LENGTHS) / 3600) == take_within(recordings, None) == recordings


def test_other_sources_and_their_hours_change_nothing():
    alone, both = recordings_of(LENGTHS), recordings_of(LENGTHS, LENGTHS[::-1])
    assert take_within(both, None, 0.25)[: len(LENGTHS)] == alone
    first = [recording for recording in take_within(both, 0.25, 0.5) if recording.source == 0]
    assert first == take_within(alone, 0.25)
    names = [{r.path.name for r in take_within(both, 0.25, 0.25) if r.source == place} for place in (0, 1)]
    assert names[0] != names[1]


def test_what_was_taken_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="finetune")
    take_within(recordings_of([1800, 1800, 1800], [60]), 1.0, None)
    assert caplog.messages == [
        "data.max_hours: 2 of 3 recordings of 0.jsonl, 1.00 of 1.50 h, drawn by the seed."
    ]


def test_hours_that_no_recording_fits_into_are_one_line():
    with pytest.raises(DataError, match=r"^data\.max_hours: 0\.01 h of 0\.jsonl are less than .* 60 s; give"):
        take_within(recordings_of(LENGTHS), 0.01)


def test_one_number_is_for_each_source_and_a_list_has_as_many():
    sources = parse_sources("a.jsonl:0.7,b.jsonl:0.3", key=KEY)
    assert limits_of(None, sources) == [None, None] and limits_of(2.5, sources) == [2.5, 2.5]
    assert limits_of([1.0, None], sources) == [1.0, None]
    with pytest.raises(ConfigError, match=r"^data\.max_hours: 1 numbers for 2 sources of"):
        limits_of([1.0], sources)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (0, "data.max_hours: 0 is not allowed, must be above 0"),
        ([1, -2.5], "data.max_hours: -2.5 is not allowed, must be above 0"),
        (float("nan"), "data.max_hours: nan is not allowed"),
        ("ten", "data.max_hours: 'ten' is not allowed, expected number or list of (number or null) or null"),
    ],
)
def test_hours_that_cannot_be_are_one_line(value, line):
    with pytest.raises(ConfigError) as error:
        build_args(TrainArgs, {"full_finetuning": True, "data": {"max_hours": value}})
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_run_takes_them_before_it_looks_at_anything_else(demo):
    values = {"train_data": str(demo.train_jsonl), "max_hours": 0.01}  # one of two dialogues of some 25 s
    args = build_args(TrainArgs, {"full_finetuning": True, "data": values})
    loaded = load_recordings(args)
    assert len(loaded.train) == len(loaded.timings) == 1
