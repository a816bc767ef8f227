"""Intervals checked against scipy.stats, which they do not use, and tables of Student's t."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from hemoco.intervals import (
    RepeatedDifference,
    Repetitions,
    confidence_half_width,
    repeated_difference,
    repeated_spread,
)

OURS = {0: 0.71, 1: 0.74, 2: 0.69, 5: 0.75}
THEIRS = {0: 0.66, 1: 0.70, 2: 0.66, 7: 0.1}


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (30, 2.045)])
def test_the_interval_uses_students_quantile(count: int, quantile: float) -> None:
    values = [float(index % 2) for index in range(count)]
    expected = quantile * statistics.stdev(values) / math.sqrt(count)
    assert confidence_half_width(values) == pytest.approx(expected, rel=1e-3)


def half_width_of(test: object) -> float:
    low, high = test.confidence_interval(0.95)  # type: ignore[attr-defined]
    return float(high - low) / 2


def test_deviations_between_pretrainings_and_over_seeds_are_reported_apart() -> None:
    spread = repeated_spread([{0: 0.7, 1: 0.72}, {0: 0.6, 1: 0.64}, {}])
    assert spread.mean == pytest.approx(0.665)
    assert spread.between == pytest.approx(stats.tstd([0.71, 0.62]))
    assert spread.within == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * 0.02**2) / 2))
    assert (spread.pretrainings, spread.values, spread.sd) == (2, 4, spread.between)


@pytest.mark.parametrize("baseline", [True, False])
def test_one_pretraining_each_is_the_paired_test_over_the_seeds_that_both_have(
    baseline: bool,
) -> None:
    difference = repeated_difference([OURS], [THEIRS], baseline=baseline)
    test = stats.ttest_rel([0.71, 0.74, 0.69], [0.66, 0.70, 0.66])
    assert difference == (pytest.approx(0.04), pytest.approx(half_width_of(test)), 3, ("seeds",))
    assert difference.stands_out is bool(test.pvalue < 0.05) is True


def test_without_measurements_the_values_are_nan() -> None:
    spread = repeated_spread([{}])
    assert math.isnan(spread.mean) and math.isnan(spread.sd)
    difference = repeated_difference([{}], [{0: 1.0}], baseline=True)
    assert math.isnan(difference.mean) and math.isnan(difference.half_width)


def test_pretrainings_with_one_seed_against_a_baseline_are_a_test_of_one_sample() -> None:
    difference = repeated_difference([{0: 0.7}, {0: 0.75}, {0: 0.68}], [{0: 0.5}], baseline=True)
    expected = half_width_of(stats.ttest_1samp([0.2, 0.25, 0.18], 0))
    assert difference == (pytest.approx(0.21), pytest.approx(expected), 1, ("pretrainings",))


def test_two_repeated_recipes_with_one_seed_are_welchs_test() -> None:
    ours, theirs = [0.7, 0.75, 0.68], [0.6, 0.61, 0.66, 0.63]
    difference = repeated_difference(
        [{0: value} for value in ours], [{0: value} for value in theirs], baseline=False
    )
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    assert difference.half_width == pytest.approx(half_width_of(test))


def test_a_single_pretraining_is_assumed_to_vary_like_the_repeated_one() -> None:
    ours, theirs = [0.7, 0.75, 0.68], [0.6]
    difference = repeated_difference(
        [{0: value} for value in ours], [{0: value} for value in theirs], baseline=False
    )
    test = stats.ttest_ind(ours, theirs, equal_var=True)
    assert difference.half_width == pytest.approx(half_width_of(test))


def test_seeds_that_are_not_common_to_all_are_left_out() -> None:
    without_common_seed = repeated_difference([OURS], [{9: 0.1}], baseline=False)
    assert (without_common_seed.seeds, without_common_seed.noise) == (0, ())
    difference = repeated_difference(
        [{0: 0.7, 1: 0.9}, {0: 0.6, 2: 0.1}], [{0: 0.5, 1: 0.1, 2: 0.3}], baseline=True
    )
    assert (difference.mean, difference.seeds) == (pytest.approx(0.15), 1)


def test_without_repetition_or_noise_significance_is_unknown() -> None:
    one_seed = repeated_difference([{0: 0.5}], [{0: 0.25, 1: 0.1}], baseline=True)
    assert (one_seed.mean, one_seed.seeds, one_seed.stands_out) == (0.25, 1, None)
    assert math.isnan(one_seed.half_width)
    equal: Repetitions = [{0: 0.5, 1: 0.5}] * 2
    assert repeated_difference(equal, [{0: 0.25, 1: 0.25}], baseline=True).stands_out is None


@pytest.mark.parametrize("baseline", [True, False])
def test_the_95_percent_interval_covers_the_true_difference_at_least_95_percent_of_the_time(
    baseline: bool,
) -> None:
    """The true means are equal; pretrainings, seeds and single measurements are all noisy."""
    generator = np.random.default_rng(0)

    def draw_difference() -> RepeatedDifference:
        # each side has seeds of its own, independent of the other's: the worst case of the pairing
        our_seeds, their_seeds = generator.normal(size=(2, 3))
        ours = generator.normal(size=(3, 1)) + our_seeds + 0.5 * generator.normal(size=(3, 3))
        if baseline:
            theirs = their_seeds[None]
        else:
            theirs = generator.normal(size=(2, 1)) + their_seeds
            theirs += 0.5 * generator.normal(size=(2, 3))
        return repeated_difference(
            [dict(enumerate(row)) for row in ours],
            [dict(enumerate(row)) for row in theirs],
            baseline=baseline,
        )

    draws = 1500
    differences = [draw_difference() for _ in range(draws)]
    covered = [abs(difference.mean) <= difference.half_width for difference in differences]
    standard_error = math.sqrt(0.95 * 0.05 / draws)
    assert np.mean(covered) > 0.95 - 3 * standard_error
