"""The functions behind tests/benchmarks/stream_scale.py, each checked another way on small data."""

import itertools
import random

import numpy as np
import pytest

from hemoco.data.stream.order import Block, Portion
from tests.benchmarks.scale_costs import (
    Cluster,
    DataSet,
    due_portions,
    epoch_fetches,
    epoch_order,
    fetch,
    index_cost,
    layout,
    process_slots,
)
from tests.benchmarks.shuffle_quality import (
    buffer_streams,
    chunk_streams,
    classes_seen,
    effective_shards,
    lane_batches,
    permutation_batches,
    quality,
    worker_batches,
)

SMALL = DataSet("small", samples=9_000, shards=60, shard_bytes=1000, shards_per_block=3)
GAP = 1 << 20


@pytest.mark.parametrize("cluster", [Cluster(4, 16), Cluster(16, 16), Cluster(16, 4)])
def test_small_shards_are_fetched_whole_by_each_process_that_meets_them(cluster: Cluster) -> None:
    for process in (0, cluster.processes // 2, cluster.processes - 1):
        slots = process_slots(SMALL, cluster, process)
        order = epoch_order(SMALL, cluster)
        met = set()
        for lane, start, stop in order.slices(*slots):
            low = lane * order.slots_per_lane
            rows = [order.samples(step, low + start, low + stop) for step in range(order.steps)]
            met |= {(lane, shard) for shard in np.concatenate(rows)[:, 0].tolist()}
        cost = epoch_fetches(SMALL, cluster, slots, most=10**6)
        assert (cost.ranges, cost.shards, cost.bytes) == (len(met), len(met), 1000 * len(met))


def test_the_slots_of_all_processes_are_the_batch() -> None:
    cluster = Cluster(16, 16)
    slots = [process_slots(SMALL, cluster, process) for process in range(16)]
    assert list(itertools.chain.from_iterable(range(*pair) for pair in slots)) == list(
        range(cluster.batch)
    )


@pytest.mark.parametrize("count", [1, 4, 12])
def test_bytes_and_ranges_of_large_shards_are_those_of_a_map_of_bytes(count: int) -> None:
    data = DataSet("large", samples=40, shards=1, shard_bytes=20_000_000, shards_per_block=1)
    numbers = random.Random(count).sample(range(40), count)
    edges, wanted = layout(40, data.shard_bytes), np.zeros(data.shard_bytes, bool)
    for number in numbers:
        wanted[edges[number] : edges[number + 1]] = True
    starts = np.flatnonzero(np.diff(np.concatenate([[0], wanted])) == 1).tolist()
    stops = np.flatnonzero(np.diff(np.concatenate([wanted, [0]])) == -1).tolist()
    needed = int(wanted.sum())
    for stop, start in zip(stops, starts[1:], strict=False):
        wanted[stop + 1 : start] |= start - stop - 1 <= GAP
    ranges = int(np.count_nonzero(np.diff(np.concatenate([[0], wanted])) == 1))
    whole = int(wanted.sum()) + ranges * GAP >= data.shard_bytes
    expected = (1, data.shard_bytes) if whole else (ranges, int(wanted.sum()))
    portion = Portion(0, 0, Block(0, 0, 0, 40), np.array([(0, number) for number in numbers]))
    cost = fetch(portion, data)
    assert ((cost.ranges, cost.bytes), cost.wanted, cost.held) == (expected, needed, needed)


def test_a_resume_needs_exactly_the_rest_of_the_open_blocks() -> None:
    cluster, order = Cluster(4, 16), epoch_order(SMALL, Cluster(4, 16))
    slots, step = process_slots(SMALL, cluster, 1), order.steps // 2
    due = due_portions(SMALL, cluster, slots, step)
    for lane, start, stop in order.slices(*slots):
        low = lane * order.slots_per_lane
        rows = [order.samples(s, low + start, low + stop) for s in range(step, order.steps)]
        rest = np.concatenate(rows)
        open_blocks = [portion for portion in due if portion.block.lane == lane]
        last = open_blocks[-1].block.stop - step * order.slots_per_lane
        assert np.array_equal(
            np.concatenate([portion.rows for portion in open_blocks]), rest[:last]
        )


def test_effective_shards_of_known_shares() -> None:
    assert effective_shards(np.array([[1, 1, 2, 3]])) == pytest.approx(1 / (1 / 4 + 2 / 16))
    assert effective_shards(np.arange(12).reshape(1, 12)) == pytest.approx(12)
    assert effective_shards(np.array([[5, 5, 5], [1, 2, 3], [1, 1, 1]])) == 1
    assert classes_seen(np.array([[5, 5, 5], [1, 2, 3], [1, 1, 2]])) == 2


def test_a_full_permutation_is_as_mixed_as_chance_says() -> None:
    sizes = np.full(100, 1000)
    mixed = quality(sizes, permutation_batches(100_000, batch=500, steps=200))
    # a pair of samples is the same one with probability 1 / 500, else of one shard with 1 / 100
    same_shard = 1 / 500 + 499 / 500 / 100
    assert mixed.effective_shards == pytest.approx(1 / same_shard, rel=0.02)
    assert mixed.classes == pytest.approx(1000 * (1 - 0.999**500), rel=0.02)


def test_one_shard_per_lane_gives_as_many_shards_as_lanes() -> None:
    sizes = np.full(64, 400)
    mixed = quality(sizes, lane_batches(sizes, lanes=16, block=1, batch=64, steps=20))
    assert 16 <= mixed.effective_shards <= 17  # a slice may lie across two shards


def test_other_loaders_give_each_sample_once() -> None:
    sizes = np.full(16, 50)
    for streams in (
        buffer_streams(sizes, workers=4, buffer=60),
        chunk_streams(800, workers=4, chunk=20),
    ):
        batches = worker_batches(streams, ranks=2, batch=40, steps=20)
        assert sorted(batches.ravel().tolist()) == list(range(800))


def test_the_index_is_measured_whole() -> None:
    cost = index_cost(SMALL)
    assert 60 * 150 < cost.disk_bytes < 60 * 250
    assert cost.columns_bytes == 60 * (len("train-000000.tar") + 1 + 32 + 8 + 8)
    assert cost.sent_bytes > cost.columns_bytes and cost.read_bytes > cost.disk_bytes
