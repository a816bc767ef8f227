"""The reader of a loader process: the right samples, each block once, within its memory.

Nothing that is damaged is used.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemoco.config import StreamConfig
from hemoco.data.shards.index import ShardColumns, read_index
from hemoco.data.shards.read import plan_ranges
from hemoco.data.stream.order import EpochOrder, Portion, plan_portions
from hemoco.data.stream.reader import SampleReader
from hemoco.data.stream.shard_cache import ShardCache
from hemoco.errors import ShardError
from tests.helpers.shard_folders import png, write_shards

SIZES = [17, 5, 30, 0, 1, 22, 40, 9]
MIB = 1 << 20


def order(epoch: int = 0, lanes: int = 4, block: int = 2, size: int = 24) -> EpochOrder:
    return EpochOrder(
        SIZES, seed=3, epoch=epoch, lanes=lanes, shards_per_block=block, global_batch_size=size
    )


def reader(url: str, portions: list[Portion], **settings: Any) -> SampleReader:
    shards = ShardColumns(read_index(url).shards)
    cache = settings.pop("cache", None)
    return SampleReader(url, shards, portions, config=StreamConfig(**settings), cache=cache)


def keys(made: SampleReader, slots: tuple[int, int], steps: range, epoch: int = 0) -> list[str]:
    slices = list(order().slices(*slots))
    return [read.key for step in steps for read, _ in made.images(epoch, step, slices)]


def expected(slots: tuple[int, int], steps: range, epoch: int = 0) -> list[str]:
    first = np.cumsum([0, *SIZES])
    rows = [row for step in steps for row in order(epoch).samples(step, *slots).tolist()]
    return [str(first[shard] + number) for shard, number in rows]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards").as_uri(), SIZES)


@pytest.mark.parametrize("slots", [(0, 24), (0, 6), (5, 13), (23, 24)])
@pytest.mark.parametrize("first_step", [0, 2])
def test_portions_hold_the_samples_of_all_steps_in_their_order(
    slots: tuple[int, int], first_step: int
) -> None:
    made = order()
    portions = list(plan_portions(made, 0, slots, first_step))
    assert [p.first_step for p in portions] == sorted(p.first_step for p in portions)
    for lane, start, stop in made.slices(*slots):
        rows = np.concatenate([p.rows for p in portions if p.block.lane == lane])
        lane_slots = lane * made.slots_per_lane + start, lane * made.slots_per_lane + stop
        expected_rows = [made.samples(s, *lane_slots) for s in range(first_step, made.steps)]
        assert np.array_equal(rows, np.concatenate(expected_rows))


@pytest.mark.parametrize("slots", [(0, 24), (7, 17)])
def test_a_reader_gives_the_images_of_every_step(shards: str, slots: tuple[int, int]) -> None:
    made = reader(shards, list(plan_portions(order(), 0, slots, 1)))
    assert keys(made, slots, range(1, order().steps)) == expected(slots, range(1, order().steps))
    made.close()


@pytest.mark.parametrize(
    ("samples", "shard", "ranges"),
    [
        ([(0, 10), (10, 10)], 20, [(0, 20)]),
        ([(5 * MIB, MIB), (0, MIB)], 100 * MIB, [(0, MIB), (5 * MIB, 6 * MIB)]),
        ([(0, 10), (MIB, 10)], 100 * MIB, [(0, MIB + 10)]),  # the gap costs less than a request
        ([(0, 99 * MIB)], 100 * MIB, [(0, 100 * MIB)]),
        ([(0, 10)], MIB, [(0, MIB)]),
    ],
)
def test_ranges_are_read_where_that_is_cheaper(
    samples: list[tuple[int, int]], shard: int, ranges: list[tuple[int, int]]
) -> None:
    offsets, sizes = zip(*samples, strict=True)
    assert plan_ranges(offsets, sizes, shard) == ranges


def test_every_range_holds_its_samples_and_none_is_read_twice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        offsets = np.sort(rng.choice(80 * MIB, 30, replace=False))
        sizes = np.minimum(rng.integers(1, MIB, 30), np.diff(offsets, append=81 * MIB))
        chosen = rng.permutation(30)[: rng.integers(1, 30)]
        ranges = plan_ranges(offsets[chosen].tolist(), sizes[chosen].tolist(), 82 * MIB)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        for start, size in zip(offsets[chosen], sizes[chosen], strict=True):
            assert any(a <= start and start + size <= b for a, b in ranges)


def test_a_block_is_fetched_once_and_not_all_at_once(shards: str) -> None:
    whole = sum(shard.bytes for shard in read_index(shards).shards)
    made = reader(shards, list(plan_portions(order(), 0, (0, 24), 0)), memory_bytes=whole)
    first = keys(made, (0, 24), range(1))
    assert made.take_counts().samples == 24 and first
    keys(made, (0, 24), range(1, order().steps))
    # shards at the edges of lanes are read by both
    assert made.take_counts().bytes <= 2 * whole
    made.close()


def test_what_is_read_ahead_keeps_within_the_memory_allowed(shards: str) -> None:
    made = reader(shards, list(plan_portions(order(block=1), 0, (0, 24), 0)), memory_bytes=1)
    for step in range(order().steps):
        list(made.images(0, step, list(order().slices(0, 24))))
        blocks = sum(opened.size for waiting in made._open.values() for opened in waiting)
        assert made._held_bytes == blocks and all(
            len(waiting) <= 2 for waiting in made._open.values()
        )
    made.close()


def test_memory_used_again_holds_the_right_samples(shards: str) -> None:
    epochs, slices = range(6), list(order().slices(0, 24))
    portions = [p for epoch in epochs for p in plan_portions(order(epoch), epoch, (0, 24), 0)]
    made, memory = reader(shards, portions, memory_bytes=1), set()
    for epoch in epochs:
        for step in range(order().steps):
            images = [bytes(read.image) for read in made.encoded(epoch, step, slices)]
            expected_keys = expected((0, 24), range(step, step + 1), epoch)
            assert images == [png(int(key)) for key in expected_keys]
            memory |= {buffer.ctypes.data for buffer in made._idle_buffers}
    assert 0 < len(memory) < len(portions)  # one portion reads several shards
    made.close()


def test_a_shard_whose_samples_were_copied_is_not_held(shards: str) -> None:
    # one slot of 24 takes less than half of every shard
    made = reader(shards, list(plan_portions(order(), 0, (0, 1), 0)))
    list(made.images(0, 0, list(order().slices(0, 1))))
    (waiting,) = made._open.values()
    buffers = [opened.result.get().buffers for opened in waiting]
    assert buffers and not any(buffers)
    assert 0 < len(made._idle_buffers) <= 4  # one for each thread
    made.close()


def test_a_cache_serves_the_next_epoch_without_a_request(shards: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * MIB)
    portions = [p for epoch in (0, 0) for p in plan_portions(order(epoch), epoch, (0, 24), 0)]
    for expected_hits in (False, True):
        made = reader(shards, portions[: len(portions) // 2], cache=cache)
        assert keys(made, (0, 24), range(order().steps)) == expected((0, 24), range(order().steps))
        counts = made.take_counts()
        assert (counts.cache_misses == 0) == expected_hits and (counts.cache_hits > 0)
        made.close()


@pytest.mark.parametrize("epoch", [0, 1])
def test_flipped_bytes_cost_their_samples_and_no_others(tmp_path: Path, epoch: int) -> None:
    url, steps = write_shards(tmp_path.as_uri(), SIZES), range(order().steps)
    path = tmp_path / "train-000006.tar"  # samples 75 to 114
    data = bytearray(path.read_bytes())
    data[data.index(png(80)) + 40] ^= 1
    portions = [p for number in (0, 1) for p in plan_portions(order(number), number, (0, 24), 0)]
    made = reader(url, portions, memory_bytes=1)  # what is not needed yet is not read
    if epoch:  # its shard was verified before
        assert keys(made, (0, 24), steps) == expected((0, 24), steps)
    path.write_bytes(data)
    wanted = expected((0, 24), steps, epoch)
    assert "80" in wanted
    assert keys(made, (0, 24), steps, epoch) == ["81" if key == "80" else key for key in wanted]
    bad = made.take_counts().bad
    assert {(b.shard, b.key, b.reason) for b in bad} == {
        (path.as_uri(), "80", "damaged since packed")
    }
    made.close()


@pytest.mark.parametrize("way", ["whole", "whole again", "ranges"])
@pytest.mark.parametrize("damage", ["cut", "another", "missing"])
def test_a_shard_that_is_not_the_packed_one_is_named(
    tmp_path: Path, damage: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "ranges":
        # every sample by a range of its own
        monkeypatch.setattr("hemoco.data.shards.read._REQUEST_BYTES", -(10**9))
    url = write_shards(tmp_path.as_uri(), SIZES)
    path = tmp_path / "train-000006.tar"
    data = path.read_bytes()
    portions = [p for epoch in (0, 1) for p in plan_portions(order(epoch), epoch, (0, 24), 0)]
    made = reader(url, portions, memory_bytes=1)  # what is not needed yet is not read
    if way == "whole again":
        keys(made, (0, 24), range(order().steps))
    if damage == "cut":
        path.write_bytes(data[: len(data) // 1024 * 512])
    elif damage == "another":
        path.write_bytes(bytes(byte ^ 1 for byte in data))
    else:
        path.unlink()
    with pytest.raises(ShardError, match=r"train-000006\.tar: .*(replaced|cut|missing)"):
        keys(made, (0, 24), range(order().steps), epoch=int(way == "whole again"))
    made.close()


def test_a_damaged_range_is_caught_by_its_crc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # these shards are so small that they would be read whole
    monkeypatch.setattr("hemoco.data.shards.read._REQUEST_BYTES", 0)
    url = write_shards(tmp_path.as_uri(), SIZES)
    shard = read_index(url).shards[6]
    path = tmp_path / shard.name
    data = bytearray(path.read_bytes())
    data[data.index(png(80)) + 40] ^= 1
    path.write_bytes(data)
    rows = np.array([[6, 5], [6, 30]])
    made = reader(url, [])
    read = dict(made._read_shard(6, rows[:, 1], []))
    assert (read[5].sound, read[30].sound) == (False, True)
    assert bytes(read[30].image) == png(105)
    assert made.take_counts().bytes < shard.bytes
