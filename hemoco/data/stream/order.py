"""Which samples make which global batch: a pure function of sizes, seed and epoch, the same for every world size.

The shards of a split, permuted anew each epoch, form one line of samples. The line is cut into equal lanes; a lane is
read in blocks of a few consecutive shards, each block shuffled as a whole. A global batch takes an equal slice of
every lane. So a rank reads only the shards of its own lanes, every rank has the same number of steps, and any step
can be computed without the ones before it.

A slot is a place in a global batch: lane l of L has the slots [l G / L, (l + 1) G / L) of all G. A rank, and within it
a loader process, owns a range of slots.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.errors import ConfigError

_SHARDS, _BLOCK = 0, 1  # purposes of a draw, part of its key


class Block(NamedTuple):
    """Consecutive shards of a lane that are shuffled together."""

    lane: int
    number: int
    """From 0 within the lane."""
    first: int
    """Samples of the lane before it."""
    last: int
    """Samples of the lane up to its end."""


class EpochOrder:
    """The sample order of one epoch.

    Args:
        sizes: samples per shard.
        lanes: parallel lanes; divides `global_batch_size`.
        shards_per_block: consecutive shards of a lane that are shuffled together.

    Attributes:
        steps: global batches in the epoch.
        width: slots of each lane in a global batch.
        left_out: samples that this epoch does not see, fewer than `lanes + global_batch_size`, others each epoch; no
            sample comes twice.

    Raises:
        ConfigError: the split has fewer samples than one global batch, or the lanes do not divide it.
    """

    def __init__(
        self,
        sizes: Sequence[int] | NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
        lanes: int,
        shards_per_block: int,
        global_batch_size: int,
    ) -> None:
        if global_batch_size % lanes:
            raise ConfigError(
                f"stream.lanes is {lanes}: it must divide the global batch size ({global_batch_size})"
            )
        counts = np.asarray(sizes, np.int64)
        samples = int(counts.sum())
        if samples < global_batch_size:
            raise ConfigError(
                f"global_batch_size is {global_batch_size}: the split has only {samples} samples; "
                f"set it to at most {samples} or pack more data"
            )
        self._key = (seed, epoch)
        self._shards_per_block = shards_per_block
        self.width = global_batch_size // lanes
        self.steps = samples // lanes // self.width
        self._lane_length = self.steps * self.width
        self.left_out = samples - lanes * self._lane_length
        draws = _generator(*self._key, _SHARDS)
        self._shards = draws.permutation(len(counts))
        self._line = np.concatenate(
            [[0], np.cumsum(counts[self._shards])]
        )  # first sample of each shard
        # a random start, so that the samples left out at both ends are others each epoch even with a single shard
        self._start = int(draws.integers(self.left_out + 1))
        self._shuffled: dict[Block, NDArray[np.int32]] = {}  # one per lane: a lane only moves on

    def samples(self, step: int, first_slot: int, last_slot: int) -> NDArray[np.int32]:
        """Slots [first_slot, last_slot) of a global batch as rows (shard number, sample number within the shard)."""
        parts = []
        for lane, begin, end in self.slices(first_slot, last_slot):
            place, stop = step * self.width + begin, step * self.width + end
            while place < stop:
                block = self._block_at(lane, place)
                upto = min(stop, block.last)
                parts.append(self.block_samples(block)[place - block.first : upto - block.first])
                place = upto
        return np.concatenate(parts)

    def slices(self, first_slot: int, last_slot: int) -> Iterator[tuple[int, int, int]]:
        """The lanes of some slots, each with the part [begin, end) of its slice of a global batch that they take."""
        for lane in range(first_slot // self.width, -(-last_slot // self.width)):
            low = lane * self.width
            yield lane, max(first_slot - low, 0), min(last_slot - low, self.width)

    def blocks(self, lane: int, step: int) -> Iterator[Block]:
        """The blocks of a lane from the one that a step begins in."""
        place = step * self.width
        while place < self._lane_length:
            block = self._block_at(lane, place)
            yield block
            place = block.last

    def block_samples(self, block: Block) -> NDArray[np.int32]:
        """All samples of a block in their order: rows (shard number, sample number within the shard)."""
        if block not in self._shuffled:
            for known in [known for known in self._shuffled if known.lane == block.lane]:
                del self._shuffled[known]
            low = self._start + block.lane * self._lane_length + block.first
            shuffled = _generator(*self._key, _BLOCK, block.lane, block.number).permutation(
                block.last - block.first
            )
            line = low + shuffled
            first, last = self._shard_at(low), self._shard_at(low + len(line) - 1)
            # among the few shards of the block: a search in the whole line misses the CPU's cache at each step
            places = first + np.searchsorted(self._line[first + 1 : last + 1], line, "right")
            rows = np.empty((len(line), 2), np.int32)
            rows[:, 0], rows[:, 1] = self._shards[places], line - self._line[places]
            self._shuffled[block] = rows
        return self._shuffled[block]

    def _block_at(self, lane: int, place: int) -> Block:
        """The block that holds the sample at a place of a lane."""
        low = self._start + lane * self._lane_length
        high = low + self._lane_length
        first_shard = self._shard_at(low)
        number = (self._shard_at(low + place) - first_shard) // self._shards_per_block
        edge = first_shard + number * self._shards_per_block
        begin = max(low, int(self._line[edge]))
        end = min(high, int(self._line[min(edge + self._shards_per_block, len(self._shards))]))
        return Block(lane, number, begin - low, end - low)

    def _shard_at(self, place: int) -> int:
        return int(np.searchsorted(self._line, place, "right")) - 1


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


_REQUEST_BYTES = 1 << 20  # a request costs about as much time as this many bytes


class Portion(NamedTuple):
    """What one loader process takes of one block."""

    epoch: int
    first_step: int
    """The first step that needs some of it."""
    block: Block
    rows: NDArray[np.int32]
    """(shard number, sample number within the shard) in the order of the steps (R, 2)."""


def plan_portions(
    order: EpochOrder, epoch: int, slots: tuple[int, int], first_step: int
) -> Iterator[Portion]:
    """The portions of some slots from a step of an epoch on, as they are needed."""

    def of_lane(lane: int, begin: int, end: int) -> Iterator[Portion]:
        for block in order.blocks(lane, first_step):
            first = max(block.first, first_step * order.width)
            rows = order.block_samples(block)[first - block.first :]
            if end - begin < order.width:  # else all of them, and nothing is copied
                places = np.arange(first, block.last) % order.width
                taken = np.flatnonzero((places >= begin) & (places < end))
                if not len(taken):
                    continue
                first, rows = first + int(taken[0]), rows[taken]
            yield Portion(epoch, first // order.width, block, rows)

    lanes = [of_lane(*piece) for piece in order.slices(*slots)]
    return heapq.merge(*lanes, key=lambda portion: portion.first_step)


def plan_ranges(
    offsets: Sequence[int], sizes: Sequence[int], shard_bytes: int
) -> list[tuple[int, int]]:
    """Byte ranges [start, stop) that hold all the samples, ascending; the whole shard where that is cheaper.

    Args:
        offsets: first byte of each sample, in any order.
        sizes: bytes of each.
        shard_bytes: bytes of the shard.
    """
    ranges: list[tuple[int, int]] = []
    for start, size in sorted(zip(offsets, sizes, strict=True)):
        if ranges and start - ranges[-1][1] <= _REQUEST_BYTES:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], start + size))
        else:
            ranges.append((start, start + size))
    cost = sum(stop - start for start, stop in ranges) + (len(ranges) - 1) * _REQUEST_BYTES
    # what is saved must be worth that the whole has one checksum and ranges have one each
    return ranges if cost + _REQUEST_BYTES < shard_bytes else [(0, shard_bytes)]
