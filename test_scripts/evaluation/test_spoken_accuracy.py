"""Accuracies of spoken pairs: hand-computed cases, ties, voices, subtypes, intervals and comparisons."""

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.checkpoint.layout import TRAINING_FILE
from finetune.checkpoint.reading import open_checkpoint
from finetune.config_io import ARGS_FILE
from finetune.errors import CheckpointError, ConfigError
from finetune.evaluation import bootstrap
from finetune.evaluation.bootstrap import RatioBootstrap
from finetune.evaluation.spoken.accuracy import (
    HEADLINE,
    accuracies,
    by_subtype,
    item_scores,
    mean_outcome,
    outcomes,
    paired_differences,
    scored_pairs,
)
from finetune.evaluation.spoken.items import Benchmark, Item, Pair
from finetune.evaluation.spoken.likelihood import ItemScore
from finetune.evaluation.spoken.measure import EncodedPairs, collect, take_ids
from finetune.evaluation.spoken.options import MOSHI_WEIGHT, semantic_weight
from finetune.files import read_json_object, write_json
from run_helpers import checkpoint_content

BOOTSTRAP = RatioBootstrap(500, seed=1)


def item(name: str) -> Item:
    return Item(name, Path(f"{name}.wav"))


def pair(id_: str, voice: str = "", subtype: str = "") -> Pair:
    return Pair(id_, voice, subtype, item(f"{id_}{voice}+"), item(f"{id_}{voice}-"))


def scored(*triples: tuple[Pair, float, float]) -> tuple[list[Pair], dict]:
    """Pairs and the headline scores of their items."""
    scores = {}
    for each, correct, incorrect in triples:
        scores |= {each.correct.name: {HEADLINE: correct}, each.incorrect.name: {HEADLINE: incorrect}}
    return [each for each, _, _ in triples], scores


def accuracy(pairs: list[Pair], scores: dict) -> float:
    return accuracies(pairs, scores, BOOTSTRAP)[HEADLINE].value


def likelihood(sums: list[float], counts: list[int]) -> ItemScore:
    values = torch.tensor(sums, dtype=torch.float64)
    return ItemScore(max(counts), values, torch.tensor(counts), 0.5)


def test_scores_weigh_the_semantic_codebook_and_divide_by_length():
    scores = item_scores(likelihood([-6.0, -4.0, -10.0], [3, 3, 2]), semantic_weight=10)
    assert scores["combined_sum"] == -10 * 6 - 4 - 10
    assert scores["combined"] == pytest.approx(-74 / (10 * 3 + 3 + 2))
    assert (scores["semantic"], scores["semantic_sum"]) == (-2, -6)
    assert (scores["codebook_2"], scores["codebook_3"]) == (pytest.approx(-4 / 3), -5)
    assert list(scores)[4:] == ["codebook_2", "codebook_3"]
    # With weight 1 all codes count the same; with a very large one only the semantic codebook does.
    item_ = likelihood([-6.0, -4.0], [3, 2])
    assert item_scores(item_, semantic_weight=1)["combined"] == -2
    assert item_scores(item_, semantic_weight=1e9)["combined"] == pytest.approx(-2, abs=1e-6)


def test_length_decides_the_sum_and_not_the_headline():
    short, long = likelihood([-9.0], [3]), likelihood([-10.0], [5])
    by_length = [item_scores(each, semantic_weight=1) for each in (short, long)]
    assert by_length[0]["combined_sum"] > by_length[1]["combined_sum"]
    assert by_length[0]["combined"] < by_length[1]["combined"]


def test_voices_are_averaged_before_ids_and_ties_count_half():
    pairs, scores = scored(
        (pair("cat", "A"), -1.0, -2.0),  # 1
        (pair("cat", "B"), -2.0, -1.0),  # 0
        (pair("cat", "C"), -1.0, -3.0),  # 1: cat 2/3
        (pair("dog", "A"), -1.0, -1.0),  # 1/2
    )
    found = accuracies(pairs, scores, BOOTSTRAP)[HEADLINE]
    assert found.value == pytest.approx((2 / 3 + 1 / 2) / 2)  # by pairs it would be 2.5 / 4
    assert (found.num_ids, found.num_pairs) == (2, 4)
    assert outcomes(pairs, scores, HEADLINE)["dog"].value == 0.5


def test_subtypes_are_apart_and_none_is_no_subtype():
    pairs, scores = scored(
        (pair("a", subtype="oov"), 2.0, 1.0),
        (pair("b", subtype="oov"), 1.0, 2.0),
        (pair("c", subtype=">100"), 2.0, 1.0),
    )
    found = by_subtype(pairs, scores, BOOTSTRAP)
    assert {name: (each.value, each.num_ids) for name, each in found.items()} == {
        ">100": (1.0, 1),
        "oov": (0.5, 2),
    }
    assert found[">100"].interval is None
    assert by_subtype(*scored((pair("a"), 2.0, 1.0)), BOOTSTRAP) == {}


def random_pairs(num_ids: int, *, seed: int) -> tuple[list[Pair], dict]:
    values = np.random.default_rng(seed).standard_normal((num_ids, 2, 2))
    return scored(
        *(
            (pair(f"{number}", voice), *map(float, values[number, index]))
            for number in range(num_ids)
            for index, voice in enumerate("AB")
        )
    )


def test_random_scores_are_at_chance_and_the_interval_has_its_size():
    covered = 0
    for seed in range(40):
        found = accuracies(*random_pairs(100, seed=seed), BOOTSTRAP)[HEADLINE]
        low, high = found.interval
        covered += low <= 0.5 <= high
        # Mean of 100 ids with outcomes 0, 1/2, 1 at 1/4, 1/2, 1/4: standard error sqrt(1/8 / 100).
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.125 / 100), rel=0.25)
    assert 34 <= covered <= 40


@pytest.mark.parametrize("kept_bytes", [0, 2**28])
def test_intervals_are_those_of_all_draws_at_once(monkeypatch, kept_bytes):
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(bootstrap, "_KEPT_BYTES", kept_bytes)
    generator = np.random.default_rng(3)
    numerators, denominators = generator.uniform(size=41), generator.uniform(1, 2, size=41)
    draws = np.random.default_rng(7).multinomial(41, np.full(41, 1 / 41), size=103)
    expected = np.percentile((draws @ numerators) / (draws @ denominators), (2.5, 97.5))
    blocks = RatioBootstrap(103, seed=7)
    for _ in range(2):  # drawn, then drawn again or kept
        assert blocks.interval(numerators, denominators) == pytest.approx(tuple(expected), rel=1e-12)


def test_memory_of_the_draws_is_bounded_whatever_their_number(monkeypatch):
    monkeypatch.setattr(bootstrap, "_BLOCK_ELEMENTS", 10_000)
    monkeypatch.setattr(bootstrap, "_KEPT_BYTES", 50_000)
    draws = RatioBootstrap(1000)
    tracemalloc.start()
    try:
        for num_units in (2000, 20, 25, 2000):  # all at once 2,000 would take 16 MB
            assert draws.interval(np.arange(num_units), np.ones(num_units)) is not None
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_more_resamples_than_fit_into_memory_are_one_line():
    with pytest.raises(ConfigError, match=r"--resamples: 10+ of 3 do not fit into memory; take fewer\."):
        RatioBootstrap(10**17).interval(np.ones(3), np.ones(3))


def test_swapped_labels_give_the_complement():
    pairs, scores = random_pairs(31, seed=5)
    scores["7A+"] = scores["7A-"]  # a tie stays one
    swapped = [dataclasses.replace(each, correct=each.incorrect, incorrect=each.correct) for each in pairs]
    assert accuracy(pairs, scores) != 0.5
    assert accuracy(swapped, scores) == pytest.approx(1 - accuracy(pairs, scores))


def test_models_are_compared_id_by_id():
    pairs, ours = random_pairs(60, seed=1)
    others = {name: dict(values) for name, values in ours.items()}
    for each in pairs[:12]:  # six ids, both voices
        ours |= {each.correct.name: {HEADLINE: 1.0}, each.incorrect.name: {HEADLINE: 0.0}}
        others |= {each.correct.name: {HEADLINE: 0.0}, each.incorrect.name: {HEADLINE: 1.0}}
    found = paired_differences(pairs, ours, others, BOOTSTRAP)[HEADLINE]
    assert found.value == pytest.approx(6 / 60)
    assert found.value == pytest.approx(accuracy(pairs, ours) - accuracy(pairs, others))
    # What both share has no part in the interval, which single accuracies of 60 ids could not tell apart.
    assert 0 < found.interval[0] < found.value < found.interval[1] < 0.2
    same = paired_differences(pairs, ours, ours, BOOTSTRAP)[HEADLINE]
    assert (same.value, same.interval) == (0.0, (0.0, 0.0))


def test_no_pair_is_no_number():
    assert mean_outcome({}, BOOTSTRAP) == (None, None, 0, 0)
    assert accuracies([], {}, BOOTSTRAP)[HEADLINE].value is None


def test_items_that_failed_take_their_pairs_out_by_name():
    pairs = [pair("a", "A"), pair("a", "B"), pair("b", "A"), pair("c", "A")]
    good, better = likelihood([-6.0, -6.0], [3, 3]), likelihood([-3.0, -3.0], [3, 3])
    likelihoods = {each.incorrect.name: good for each in pairs} | {
        each.correct.name: better for each in pairs
    }
    likelihoods["bA-"] = likelihood([-math.inf, -6.0], [3, 3])
    likelihoods["aB+"] = likelihood([math.nan, -6.0], [3, 3])
    likelihoods["cA+"] = likelihood([-3.0, 0.0], [3, 0])  # nothing to score in a codebook
    encoded = EncodedPairs("swuggy", pairs, {}, {"zz": "does not exist"})
    measured = collect(encoded, likelihoods, semantic_weight=1)
    assert [each.id + each.voice for each in measured.pairs] == ["aA"] and measured.num_asked == 4
    assert sorted(measured.failures) == ["aB+", "bA-", "cA+", "zz"]
    assert accuracy(measured.pairs, measured.scores) == 1
    assert scored_pairs(pairs, measured.scores.keys()) == measured.pairs


def test_a_subset_takes_whole_ids_and_is_the_same_whatever_the_order():
    pairs = [pair(f"{number}", voice) for number in range(20) for voice in "AB"]
    found = take_ids(Benchmark("swuggy", pairs), 5, seed=3).pairs
    ids = [each.id for each in found]
    assert len(ids) == 10 and len(set(ids)) == 5 and ids == sorted(ids, key=int)
    again = take_ids(Benchmark("swuggy", pairs[::-1]), 5, seed=3).pairs
    assert {each.id for each in again} == set(ids)
    assert {each.id for each in take_ids(Benchmark("swuggy", pairs), 5, seed=4).pairs} != set(ids)
    assert take_ids(Benchmark("swuggy", pairs), 20, seed=3).pairs == pairs


def test_failures_of_ids_that_were_not_drawn_do_not_count():
    pairs = [pair(f"{number}") for number in range(20)]
    names = {
        f"{number}B": f"{number}" for number in range(20)
    }  # another voice of each id, without counterpart
    failures = dict.fromkeys([*names, "lost"], "has no counterpart")
    benchmark = Benchmark("swuggy", pairs, failures, names | {"21A": "21"})
    found = take_ids(benchmark, 5, seed=3)
    ids = {each.id for each in found.pairs}
    assert len(ids) == 5 and found.failures.keys() == {f"{id_}B" for id_ in ids}
    assert found.ids == ids and take_ids(benchmark, None, seed=3).failures == failures


def test_the_semantic_weight_travels_with_the_checkpoint(untrained_run, tmp_path):
    checkpoint = open_checkpoint(untrained_run("lora"))
    assert semantic_weight(checkpoint) == (1.0, TRAINING_FILE)
    assert semantic_weight(checkpoint, given=7.0) == (7.0, "--semantic-weight")
    old = dataclasses.replace(checkpoint, first_codebook_weight=None)
    assert semantic_weight(old)[0] == MOSHI_WEIGHT == 100
    run = tmp_path / "run"
    folder = run / "checkpoints" / "checkpoint_000007" / "consolidated"
    old = dataclasses.replace(old, folder=folder)
    folder.mkdir(parents=True)
    (run / ARGS_FILE).write_text("first_codebook_weight_multiplier: 25.0\n")
    assert semantic_weight(old) == (25.0, ARGS_FILE)
    (run / ARGS_FILE).write_text("first_codebook_weight_multiplier: much\n")
    with pytest.raises(ConfigError, match="'much' is not a number greater than 0; give --semantic-weight"):
        semantic_weight(old)


@pytest.mark.parametrize("value", ["much", -1, True, 0])
def test_a_weight_that_is_none_is_a_damaged_checkpoint(untrained_run, tmp_path, value):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in checkpoint_content(untrained_run("lora")).iterdir():
        (folder / path.name).symlink_to(path)
    training = read_json_object(folder / TRAINING_FILE)
    (folder / TRAINING_FILE).unlink()
    write_json(folder / TRAINING_FILE, training | {"first_codebook_weight_multiplier": value})
    with pytest.raises(CheckpointError, match="is not a number greater than 0"):
        open_checkpoint(folder)
