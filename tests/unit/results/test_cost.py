"""Active time, computed by hand for trainings that ran through, paused, or were killed."""

import math

import pytest

from hemoco.results.cost import Activity, RateRecord, measure_activity


@pytest.mark.parametrize(
    ("rates", "ended_s", "expected"),
    [
        # 10 steps of 32 images at 32 images/s take 10 s; 5 s of start, 2 s between records, 3 s at
        # the end
        ([(15, 10, 32), (27, 20, 32)], 30, (30, 20, 640, 0)),
        # it runs: up to the last record
        ([(15, 10, 32), (27, 20, 32)], None, (27, 20, 640, 0)),
        # an hour between two records: a pause
        ([(15, 10, 32), (3627, 20, 32)], 3630, (28, 20, 640, 1)),
        # killed, resumed from step 10: steps 11 to 20 are trained twice
        ([(15, 10, 32), (27, 20, 32), (60, 20, 32)], 60, (60, 30, 960, 0)),
        # the last record covers fewer steps
        ([(15, 10, 32), (19, 14, 32)], 19, (19, 14, 448, 0)),
    ],
)
def test_activity_is_training_and_what_lies_between(
    rates: list[tuple[float, int, float]],
    ended_s: float | None,
    expected: tuple[float, float, int, int],
) -> None:
    records = [RateRecord(*rate) for rate in rates]
    assert measure_activity(records, began_s=0, ended_s=ended_s, every=10, batch=32) == Activity(
        *expected
    )


def test_a_training_without_records_costs_nobody_knows_what() -> None:
    found = measure_activity([], began_s=0, ended_s=10, every=10, batch=32)
    assert math.isnan(found.active_s) and found.trained_images == 0
