"""The order of samples against a slow reference, and its promises for ranks, resumes and epochs."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from hemoco.data.stream.order import EpochOrder
from hemoco.errors import ConfigError

SIZES = [31, 0, 7, 60, 1, 44, 12, 25, 58, 3, 19, 40, 33, 8]
BATCH = 24


def order(
    sizes: list[int] = SIZES,
    *,
    seed: int = 7,
    epoch: int = 0,
    lanes: int = 6,
    shards_per_block: int = 3,
    global_batch_size: int = BATCH,
) -> EpochOrder:
    return EpochOrder(
        sizes,
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        shards_per_block=shards_per_block,
        global_batch_size=global_batch_size,
    )


def all_batches(made: EpochOrder) -> NDArray[np.int64]:
    """All global batches of an epoch (steps, 24, 2)."""
    return np.stack([made.samples(step, 0, BATCH) for step in range(made.steps)])


def as_pairs(batches: NDArray[np.int64]) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in batches.reshape(-1, 2).tolist()]


def draws(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def slow_epoch(
    sizes: list[int], seed: int, epoch: int, lanes: int, shards_per_block: int
) -> list[tuple[int, int]]:
    """The batches of an epoch, one after the other, with every sample in a list.

    Only the random draws are those of `EpochOrder`: their keys are part of its definition.
    """
    first_draws = draws(seed, epoch, 0)
    permuted = first_draws.permutation(len(sizes)).tolist()
    sequence = []  # (position of the shard in the permutation, shard, sample)
    for position, shard in enumerate(permuted):
        sequence += [(position, shard, number) for number in range(sizes[shard])]
    steps, left_out = divmod(len(sequence), BATCH)
    length = steps * BATCH // lanes
    lane_start = int(first_draws.integers(left_out + 1))
    shuffled_lanes = []
    for lane in range(lanes):
        samples = sequence[lane_start : lane_start + length]
        lane_start += length
        first_position = samples[0][0]
        blocks: dict[int, list[tuple[int, int]]] = {}
        for position, shard, number in samples:
            block = (position - first_position) // shards_per_block
            blocks.setdefault(block, []).append((shard, number))
        shuffled = []
        for block, block_samples in blocks.items():
            permutation = draws(seed, epoch, 1, lane, block).permutation(len(block_samples))
            shuffled += [block_samples[i] for i in permutation]
        shuffled_lanes.append(shuffled)
    width = BATCH // lanes
    epoch_samples = []
    for step in range(steps):
        for shuffled in shuffled_lanes:
            epoch_samples += shuffled[step * width : (step + 1) * width]
    return epoch_samples


@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (6, 3), (24, 2), (12, 100), (4, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("sizes", [SIZES, [100], [5] * 40, [0, 0, 30, 0]])
def test_the_order_is_that_of_the_slow_reference(
    sizes: list[int], epoch: int, lanes: int, block: int
) -> None:
    made = order(sizes, epoch=epoch, lanes=lanes, shards_per_block=block)
    assert as_pairs(all_batches(made)) == slow_epoch(sizes, 7, epoch, lanes, block)


@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (6, 3), (24, 2), (12, 100)])
def test_every_sample_comes_at_most_once_and_few_are_left_out(lanes: int, block: int) -> None:
    made = order(lanes=lanes, shards_per_block=block)
    samples = as_pairs(all_batches(made))
    assert len(set(samples)) == len(samples)
    assert all(0 <= sample < SIZES[shard] for shard, sample in samples)
    assert made.left_out == sum(SIZES) - len(samples) == sum(SIZES) % BATCH


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 24])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    reference, made = all_batches(order()), order()
    cuts = [BATCH * rank // world_size for rank in range(world_size + 1)]
    for step in range(made.steps):
        ranks = [made.samples(step, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(ranks), reference[step])


def test_a_step_computed_alone_equals_the_step_reached_by_iteration() -> None:
    reference = all_batches(order())
    for step in reversed(range(len(reference))):
        assert np.array_equal(order().samples(step, 0, BATCH), reference[step])
    backwards = order()
    for step in reversed(range(len(reference))):
        assert np.array_equal(backwards.samples(step, 0, BATCH), reference[step])


def test_epochs_and_seeds_give_different_orders_of_equal_length() -> None:
    first = all_batches(order())
    second = all_batches(order(epoch=1))
    other = all_batches(order(seed=8))
    assert first.shape == second.shape == other.shape
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_samples_left_out_of_a_single_shard_differ_between_epochs() -> None:
    epochs = [set(as_pairs(all_batches(order([100], epoch=epoch)))) for epoch in range(20)]
    assert all(len(samples) == 96 for samples in epochs)
    assert len(set.union(*epochs)) == 100


def test_a_batch_draws_on_as_many_shards_as_lanes_and_blocks_allow() -> None:
    made = order([50] * 64, lanes=8, shards_per_block=4, global_batch_size=32)
    batches = [made.samples(step, 0, 32) for step in range(made.steps)]
    shards_per_batch = [len(np.unique(batch[:, 0])) for batch in batches]
    assert np.mean(shards_per_batch) > 16


def test_two_samples_of_a_shard_are_rarely_neighbours_in_storage_order() -> None:
    made = order([500], lanes=1, shards_per_block=1, global_batch_size=500)
    numbers = made.samples(0, 0, 500)[:, 1]
    assert np.mean(np.abs(np.diff(numbers)) == 1) < 0.02


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
