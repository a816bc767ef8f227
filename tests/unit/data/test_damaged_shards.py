"""The rule that tells damaged shards from replaced ones."""

import pytest

from hemoco.data.shards.read import is_another_shard


@pytest.mark.parametrize(
    ("samples", "examined", "most_damaged"),
    [
        (1000, 1000, 500),  # all samples were compared: half of them may be damaged
        (1000, 20, 10),  # some were compared: half of these
        (1000, 5, 3),  # few were compared: three are always allowed
        (1000, 2, 2),
        (3, 3, 2),  # a small shard in which every sample is damaged was replaced
        (1, 1, 0),
    ],
)
def test_more_damaged_samples_than_that_are_another_shard(samples, examined, most_damaged):
    for damaged in range(examined + 1):
        replaced = is_another_shard(examined=examined, damaged=damaged, samples=samples)
        assert replaced == (damaged > most_damaged)
