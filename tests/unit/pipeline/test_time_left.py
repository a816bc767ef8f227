"""The estimate of the time left in progress lines."""

import pytest

from pipeline.time_left import TimeLeft, left_text


def test_nothing_is_known_after_the_first_step() -> None:
    assert TimeLeft(100).seconds(1, 50.0) is None


def test_the_first_step_does_not_count() -> None:
    left = TimeLeft(100)
    left.seconds(1, 50.0)
    assert left.seconds(11, 70.0) == pytest.approx(89 * 2.0)


def test_a_resumed_training_counts_from_where_it_resumed() -> None:
    left = TimeLeft(1000)
    left.seconds(901, 0.0)
    assert left.seconds(951, 100.0) == pytest.approx(49 * 2.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.4, "about 0 s left"),
        (89, "about 89 s left"),
        (185, "about 3 min left"),
        (9000, "about 2.5 h left"),
    ],
)
def test_the_unit_suits_the_time(seconds: float | None, text: str) -> None:
    assert left_text(seconds) == text
