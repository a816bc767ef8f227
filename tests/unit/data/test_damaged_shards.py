"""The one rule for shards whose bytes are not the packed ones: damaged, or another shard."""

import pytest

from hemoco.data.shards.read import is_another_shard


@pytest.mark.parametrize(
    ("samples", "examined", "most_damaged"),
    [
        (1000, 1000, 500),  # all were compared: half of them
        (1000, 20, 10),  # some were: half of these
        (1000, 5, 3),  # few were: three say nothing about the rest
        (1000, 2, 2),
        (3, 3, 2),  # a small shard of which nothing is left is another one
        (1, 1, 0),
    ],
)
def test_more_damaged_samples_than_that_are_another_shard(samples, examined, most_damaged):
    found = [
        is_another_shard(examined=examined, damaged=n, samples=samples) for n in range(examined + 1)
    ]
    assert found == [number > most_damaged for number in range(examined + 1)]
