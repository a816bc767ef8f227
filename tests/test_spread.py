"""Against scipy.stats, which the code does not use, and published quantiles of Student's t."""

import math

import pytest
from scipy import stats

from hemoco.spread import Difference, confidence_half_width, paired_difference, spread_of

OURS = {0: 0.71, 1: 0.74, 2: 0.69, 5: 0.75}
THEIRS = {0: 0.66, 1: 0.70, 2: 0.66, 7: 0.1}


def test_a_difference_is_paired_over_the_seeds_that_both_have() -> None:
    found = paired_difference(OURS, THEIRS)
    test = stats.ttest_rel([0.71, 0.74, 0.69], [0.66, 0.70, 0.66])
    low, high = test.confidence_interval(0.95)
    assert found == (pytest.approx(0.04), pytest.approx((high - low) / 2), 3)
    assert found.stands_out is bool(test.pvalue < 0.05) is True


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.706), (5, 2.776), (30, 2.045)])
def test_the_interval_uses_students_quantile(count: int, quantile: float) -> None:
    values = [float(place % 2) for place in range(count)]
    assert confidence_half_width(values) == pytest.approx(quantile * spread_of(values).sd / math.sqrt(count), rel=1e-3)


def test_one_seed_says_nothing_about_noise() -> None:
    found = paired_difference({0: 0.5}, {0: 0.25, 1: 0.1})
    assert (found.mean, found.pairs, found.stands_out) == (0.25, 1, None)
    assert math.isnan(found.half_width)


def test_what_was_not_measured_is_nan() -> None:
    assert all(math.isnan(value) for value in (*spread_of([])[:2], paired_difference({}, {0: 1.0}).mean))
    assert Difference(0.1, math.nan, 1).stands_out is None


def test_equal_differences_say_nothing_about_noise() -> None:
    found = paired_difference({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25})
    assert (found.half_width, found.stands_out) == (0.0, None)
