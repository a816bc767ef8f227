import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hemoco.data.stream.order import EpochOrder
from hemoco.errors import ConfigError

SIZES = [31, 0, 7, 60, 1, 44, 12, 25, 58, 3, 19, 40, 33, 8]


def order(
    sizes: list[int] = SIZES,
    *,
    seed: int = 7,
    epoch: int = 0,
    lanes: int = 6,
    shards_per_block: int = 3,
    global_batch_size: int = 24,
) -> EpochOrder:
    return EpochOrder(
        sizes,
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        shards_per_block=shards_per_block,
        global_batch_size=global_batch_size,
    )


def whole(made: EpochOrder) -> NDArray[np.int64]:
    return np.stack([made.samples(step, 0, 24) for step in range(made.steps)])


def flat(batches: NDArray[np.int64]) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in batches.reshape(-1, 2).tolist()]


@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (6, 3), (24, 2), (12, 100)])
def test_every_sample_comes_at_most_once_and_few_are_left_out(lanes: int, block: int) -> None:
    seen = flat(whole(order(lanes=lanes, shards_per_block=block)))
    assert len(set(seen)) == len(seen)
    assert all(0 <= sample < SIZES[shard] for shard, sample in seen)
    assert sum(SIZES) - len(seen) < lanes + 24


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 24])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    reference, made = whole(order()), order()
    cuts = [24 * rank // world_size for rank in range(world_size + 1)]
    for step in range(made.steps):
        ranks = [made.samples(step, low, high) for low, high in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(ranks), reference[step])


def test_a_step_computed_alone_equals_the_step_reached_by_iteration() -> None:
    reference = whole(order())
    for step in reversed(range(len(reference))):
        assert np.array_equal(order().samples(step, 0, 24), reference[step])
    backwards = order()
    for step in reversed(range(len(reference))):
        assert np.array_equal(backwards.samples(step, 0, 24), reference[step])


def test_epochs_and_seeds_give_different_orders_of_equal_length() -> None:
    first, second, other = whole(order()), whole(order(epoch=1)), whole(order(seed=8))
    assert first.shape == second.shape == other.shape
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_samples_left_out_of_a_single_shard_differ_between_epochs() -> None:
    seen = [set(flat(whole(order([100], epoch=epoch)))) for epoch in range(20)]
    assert all(len(samples) == 96 for samples in seen)
    assert len(set.union(*seen)) == 100


def test_a_batch_draws_on_as_many_shards_as_lanes_and_blocks_allow() -> None:
    made = order([50] * 64, lanes=8, shards_per_block=4, global_batch_size=32)
    shards = [
        len({shard for shard, _ in flat(made.samples(step, 0, 32))}) for step in range(made.steps)
    ]
    assert np.mean(shards) > 16


def test_two_samples_of_a_shard_are_rarely_neighbours_in_storage_order() -> None:
    lane = order([500], lanes=1, shards_per_block=1, global_batch_size=500).samples(0, 0, 500)[:, 1]
    assert np.mean(np.abs(np.diff(lane)) == 1) < 0.02


def test_a_split_smaller_than_a_global_batch_is_refused_with_its_size() -> None:
    with pytest.raises(
        ConfigError, match=r"global_batch_size is 24: the split has only 23 samples"
    ):
        order([20, 3])
    assert order([20, 4]).steps == 1


def test_lanes_that_do_not_divide_the_global_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stream\.lanes is 5: it must divide"):
        order(lanes=5)


def test_a_plan_for_a_billion_samples_is_made_in_little_time_and_memory() -> None:
    made = order([10_000] * 100_000, lanes=512, shards_per_block=2, global_batch_size=8192)
    assert made.samples(54_321, 0, 64).shape == (64, 2)
