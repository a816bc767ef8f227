"""Against scipy.stats, which the code does not use, and published quantiles of Student's t."""

import math

import numpy as np
import pytest
from scipy import stats

from hemoco.intervals import (
    RepeatedDifference,
    Repetitions,
    confidence_half_width,
    repeated_difference,
    repeated_spread,
    spread_of,
)

OURS = {0: 0.71, 1: 0.74, 2: 0.69, 5: 0.75}
THEIRS = {0: 0.66, 1: 0.70, 2: 0.66, 7: 0.1}


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (30, 2.045)])
def test_the_interval_uses_students_quantile(count: int, quantile: float) -> None:
    values = [float(place % 2) for place in range(count)]
    assert confidence_half_width(values) == pytest.approx(
        quantile * spread_of(values).sd / math.sqrt(count), rel=1e-3
    )


def half_width_of(test: object) -> float:
    low, high = test.confidence_interval(0.95)  # type: ignore[attr-defined]
    return float(high - low) / 2


def test_deviations_between_pretrainings_and_over_seeds_are_said_apart() -> None:
    found = repeated_spread([{0: 0.7, 1: 0.72}, {0: 0.6, 1: 0.64}, {}])
    assert found[:2] == (pytest.approx(0.665), pytest.approx(stats.tstd([0.71, 0.62])))
    assert found.within == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * 0.02**2) / 2))
    assert (found.pretrainings, found.values, found.sd) == (2, 4, found.between)


@pytest.mark.parametrize("baseline", [True, False])
def test_one_pretraining_each_is_the_paired_test_over_the_seeds_that_both_have(
    baseline: bool,
) -> None:
    found = repeated_difference([OURS], [THEIRS], baseline=baseline)
    test = stats.ttest_rel([0.71, 0.74, 0.69], [0.66, 0.70, 0.66])
    assert found == (pytest.approx(0.04), pytest.approx(half_width_of(test)), 3, ("seeds",))
    assert found.stands_out is bool(test.pvalue < 0.05) is True


def test_what_was_not_measured_is_nan() -> None:
    assert all(math.isnan(value) for value in spread_of([])[:2])
    assert all(
        math.isnan(value) for value in repeated_difference([{}], [{0: 1.0}], baseline=True)[:2]
    )


def test_pretrainings_with_one_seed_against_a_baseline_are_a_test_of_one_sample() -> None:
    found = repeated_difference([{0: 0.7}, {0: 0.75}, {0: 0.68}], [{0: 0.5}], baseline=True)
    expected = half_width_of(stats.ttest_1samp([0.2, 0.25, 0.18], 0))
    assert found == (pytest.approx(0.21), pytest.approx(expected), 1, ("pretrainings",))


def test_two_repeated_recipes_with_one_seed_are_welchs_test() -> None:
    ours, theirs = [0.7, 0.75, 0.68], [0.6, 0.61, 0.66, 0.63]
    found = repeated_difference([{0: v} for v in ours], [{0: v} for v in theirs], baseline=False)
    assert found.half_width == pytest.approx(
        half_width_of(stats.ttest_ind(ours, theirs, equal_var=False))
    )


def test_a_single_pretraining_is_taken_to_scatter_as_the_repeated_one() -> None:
    ours, theirs = [0.7, 0.75, 0.68], [0.6]
    found = repeated_difference([{0: v} for v in ours], [{0: v} for v in theirs], baseline=False)
    assert found.half_width == pytest.approx(
        half_width_of(stats.ttest_ind(ours, theirs, equal_var=True))
    )


def test_seeds_that_are_not_common_to_all_are_left_out() -> None:
    assert repeated_difference([OURS], [{9: 0.1}], baseline=False)[2:] == (0, ())
    found = repeated_difference(
        [{0: 0.7, 1: 0.9}, {0: 0.6, 2: 0.1}], [{0: 0.5, 1: 0.1, 2: 0.3}], baseline=True
    )
    assert (found.mean, found.seeds) == (pytest.approx(0.15), 1)


def test_nothing_repeated_or_nothing_moved_says_nothing() -> None:
    one_seed = repeated_difference([{0: 0.5}], [{0: 0.25, 1: 0.1}], baseline=True)
    assert (one_seed.mean, one_seed.seeds, one_seed.stands_out) == (0.25, 1, None)
    assert math.isnan(one_seed.half_width)
    equal: Repetitions = [{0: 0.5, 1: 0.5}] * 2
    assert repeated_difference(equal, [{0: 0.25, 1: 0.25}], baseline=True).stands_out is None


@pytest.mark.parametrize("baseline", [True, False])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(baseline: bool) -> None:
    generator = np.random.default_rng(0)

    def drawn() -> RepeatedDifference:
        """Equal means; pretrainings, seeds and single measurements scatter; the two sides' seeds are independent."""
        seeds, own = generator.normal(size=(2, 3))
        ours = generator.normal(size=(3, 1)) + seeds + 0.5 * generator.normal(size=(3, 3))
        theirs = (
            own[None]
            if baseline
            else generator.normal(size=(2, 1)) + own + 0.5 * generator.normal(size=(2, 3))
        )
        return repeated_difference(
            *([dict(enumerate(row)) for row in side] for side in (ours, theirs)), baseline=baseline
        )

    covered = [abs(found.mean) <= found.half_width for found in (drawn() for _ in range(1500))]
    assert np.mean(covered) > 0.95 - 3 * math.sqrt(
        0.95 * 0.05 / 1500
    )  # three standard errors of the share
