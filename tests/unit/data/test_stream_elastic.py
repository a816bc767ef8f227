"""Any world size, number of loader processes and kills give the same global batches.

Each sample of an epoch comes at most once.
"""

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.shards.index import ShardColumns, read_index
from hemoco.data.stream.batches import pretraining_plan
from hemoco.data.stream.loader import CropSource, StreamPosition
from hemoco.data.stream.order import EpochOrder
from tests.helpers.shard_folders import write_shards

EPOCHS = 2
Keys = dict[StreamPosition, list[str]]

# G, and a number of lanes that divides it
batch_shapes = st.sampled_from([(12, 1), (12, 4), (12, 12), (24, 6), (24, 8), (8, 2)])
shard_sizes = st.lists(st.integers(0, 25), min_size=1, max_size=9).filter(
    lambda sizes: sum(sizes) >= 24
)


@st.composite
def attempts(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """World size, loader processes, and steps until the kill, of each attempt of a training."""
    attempt = st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(1, 5))
    return draw(st.lists(attempt, min_size=1, max_size=4))


def config(batch: int, lanes: int, block: int, workers: int, seed: int) -> PretrainConfig:
    return PretrainConfig(
        global_batch_size=batch,
        seed=seed,
        views=ViewsConfig(size=8),
        moco=MoCoConfig(queue_length=batch, bn_group_size=2),
        stream=StreamConfig(workers=workers, lanes=lanes, shards_per_block=block),
    )


def run_attempt(
    url: str, made: PretrainConfig, world_size: int, start: StreamPosition | None, steps: int | None
) -> Keys:
    """Keys of the global batches until the kill, from all loader processes of all ranks."""
    shards, size = ShardColumns(read_index(url).shards), made.global_batch_size
    keys: Keys = {}
    for rank in range(world_size):
        slots = (size * rank // world_size, size * (rank + 1) // world_size)
        plan = replace(pretraining_plan(made), epochs=EPOCHS)
        source = CropSource(url, shards, plan, slots=slots, start=start)
        for part in source._slots:
            for crops in itertools.islice(source._crop_batches(part), steps):
                assert crops.slots == part
                keys.setdefault(crops.position, []).extend(crops.keys)
    return keys


def reference(sizes: Sequence[int], made: PretrainConfig) -> Keys:
    """Keys of all global batches by the order alone, without reading."""
    first = [0, *itertools.accumulate(sizes)]
    keys = {}
    for epoch in range(EPOCHS):
        order = EpochOrder(
            sizes,
            seed=made.seed,
            epoch=epoch,
            lanes=made.stream.lanes,
            shards_per_block=made.stream.shards_per_block,
            global_batch_size=made.global_batch_size,
        )
        for step in range(order.steps):
            rows = order.samples(step, 0, made.global_batch_size).tolist()
            position = StreamPosition(epoch, step)
            keys[position] = [str(first[shard] + number) for shard, number in rows]
    return keys


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    sizes=shard_sizes,
    shape=batch_shapes,
    block=st.integers(1, 4),
    history=attempts(),
    seed=st.integers(0, 99),
)
def test_order_and_exactly_once_hold_over_kills_and_changes_of_the_world_size(
    sizes: list[int],
    shape: tuple[int, int],
    block: int,
    history: list[tuple[int, int, int]],
    seed: int,
) -> None:
    url = write_shards(f"memory://{uuid.uuid4().hex}", sizes)
    expected = reference(sizes, config(*shape, block, 0, seed))
    seen: Keys = {}
    position: StreamPosition | None = None
    for world_size, workers, steps in [*history, (1, 0, 10**6)]:
        part = run_attempt(url, config(*shape, block, workers, seed), world_size, position, steps)
        assert not seen.keys() & part.keys()
        seen |= part
        position = max(part, default=position)
    assert seen == expected
    for epoch in range(EPOCHS):
        batches = [batch for position, batch in seen.items() if position.epoch == epoch]
        keys = [key for batch in batches for key in batch]
        assert len(set(keys)) == len(keys) > sum(sizes) - sum(shape)
