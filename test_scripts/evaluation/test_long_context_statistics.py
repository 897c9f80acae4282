"""Statistics along recordings: windows, slopes and differences against numbers worked out by hand."""

import numpy as np
import pytest

from finetune.evaluation.long_context.statistics import (
    Bootstrap,
    Ratio,
    Window,
    bin_ratios,
    differences,
    mean_ratio,
    slope_ratio,
    thirds,
    window_ratio,
)

NAN = np.nan


def value(ratio):
    return Bootstrap().estimate(ratio).value


def test_a_window_averages_its_frames_and_counts_them_and_their_recordings():
    first, second = np.arange(10.0), np.array([10.0, 20, 30, NAN, 50, 60])
    estimate = Bootstrap().estimate(window_ratio([first, second], Window(4, 2)))
    # Frames 2 to 5: 2, 3, 4, 5 and 30, 50, 60.
    assert estimate.value == pytest.approx((14 + 140) / 7)
    assert (estimate.num_frames, estimate.num_recordings) == (7, 2)


def test_only_recordings_that_reach_the_centre_count_and_a_window_that_none_reaches_is_missing():
    recordings = [np.full(7, 1.0), np.full(8, 2.0), np.full(9, 4.0)]
    estimate = Bootstrap().estimate(window_ratio(recordings, Window(8, 3)))
    assert (estimate.value, estimate.num_frames, estimate.num_recordings) == ((3 * 2 + 4 * 4) / 7, 7, 2)
    assert Bootstrap().estimate(window_ratio(recordings, Window(10, 5))) == (None, None, 0, 0)
    assert Bootstrap().estimate(window_ratio([np.full(20, NAN)], Window(10, 5))) == (None, None, 0, 0)


def test_windows_are_named_as_the_field_does():
    assert [Window(at, 1).name for at in (500, 2000, 8000, 24000, 12500)] == [
        "librilight_500",
        "librilight_2k",
        "librilight_8k",
        "librilight_24k",
        "librilight_12500",
    ]


def test_a_slope_is_least_squares_per_1000_frames():
    # By hand: x = 0..3, y = 1, 3, 2, 6: covariance 7, variance 5.
    assert value(slope_ratio([np.array([1.0, 3, 2, 6])], 0, 4)) == pytest.approx(1000 * 7 / 5)
    noise = np.random.default_rng(0).normal(size=5000)
    line = 3 - 0.25 * np.arange(5000) / 1000 + noise
    line[::7] = NAN
    kept = np.isfinite(line)
    expected = np.polyfit(np.arange(5000)[kept] / 1000, line[kept], 1)[0]
    assert value(slope_ratio([line], 0, 5000)) == pytest.approx(expected)
    expected = np.polyfit(np.arange(1000, 3000)[kept[1000:3000]] / 1000, line[1000:3000][kept[1000:3000]], 1)
    assert value(slope_ratio([line], 1000, 3000)) == pytest.approx(expected[0])


def test_a_short_recording_with_another_level_does_not_bend_the_slope():
    long, short = 5 - np.arange(3000) / 1000, 1 - np.arange(1000) / 1000
    assert value(slope_ratio([long, short], 0, 3000)) == pytest.approx(-1)
    pooled = np.polyfit(np.r_[np.arange(3000), np.arange(1000)] / 1000, np.r_[long, short], 1)[0]
    assert pooled > -0.5


def test_thirds_meet_without_gap_and_have_slopes_of_their_own():
    assert thirds(10) == {"early": (0, 3), "middle": (3, 7), "late": (7, 10)}
    losses = np.r_[np.arange(1000) * -0.002, np.full(1000, -2.0), np.arange(1000) * 0.001] + 7
    slopes = [value(slope_ratio([losses], *edges)) for edges in thirds(3000).values()]
    assert slopes == pytest.approx([-2, 0, 1])


def test_slopes_need_two_frames():
    assert value(slope_ratio([np.array([1.0]), np.array([NAN, 2.0])], 0, 5)) is None
    assert value(slope_ratio([], 0, 5)) is None


def test_an_interval_over_recordings_needs_two_of_them_and_is_seeded():
    recordings = list(np.random.default_rng(0).normal(size=(12, 50)))
    one = Bootstrap().estimate(mean_ratio(recordings[:1]))
    assert one.interval is None and one.value == pytest.approx(recordings[0].mean())
    first, again, other = (Bootstrap(seed=s).estimate(mean_ratio(recordings)).interval for s in (3, 3, 4))
    assert first == again != other


def test_the_interval_is_that_of_resampled_means():
    means = np.arange(8.0)
    low, high = Bootstrap(4000).estimate(mean_ratio([np.full(5, m) for m in means])).interval
    draws = np.random.default_rng(9).choice(means, (20000, 8)).mean(1)
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.15)


def test_intervals_cover_the_truth_as_often_as_they_claim():
    generator = np.random.default_rng(1)
    covered = 0
    for number in range(300):
        levels = generator.normal(size=40)
        low, high = Bootstrap(400, seed=number).estimate(mean_ratio([np.full(3, x) for x in levels])).interval
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_paired_differences_do_not_see_what_recordings_have_in_common():
    generator = np.random.default_rng(0)
    levels = generator.normal(size=10) * 5
    frozen = [level + generator.normal(size=100) * 0.1 for level in levels]
    on = [losses - 0.3 for losses in frozen]
    paired = Bootstrap().estimate(mean_ratio(differences(on, frozen)))
    assert paired.value == pytest.approx(-0.3)
    assert paired.interval == pytest.approx((-0.3, -0.3))
    low, high = Bootstrap().estimate(mean_ratio(on)).interval
    assert high - low > 1


def test_bins_average_positions_to_the_end_of_the_longest_recording():
    ratios = bin_ratios([np.arange(5.0), np.array([10.0, NAN])], 2)
    assert [value(r) for r in ratios] == pytest.approx([11 / 3, 2.5, 4])
    assert [int(r.counts.sum()) for r in ratios] == [3, 2, 1]
    assert bin_ratios([], 2) == []


def test_recordings_without_targets_do_not_count_as_recordings():
    ratio = Ratio(np.array([2.0, 0]), np.array([4.0, 0]), np.array([4.0, 0]))
    assert Bootstrap().estimate(ratio) == (0.5, None, 4, 1)
