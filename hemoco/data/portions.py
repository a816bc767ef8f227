"""What a loader process has to read, and how: pure functions of the order and the sample tables.

Shapes: R samples of a portion.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.data.stream.order import Block, EpochOrder

_REQUEST_BYTES = 1 << 20  # a request costs about as much time as this many bytes


class Portion(NamedTuple):
    """What one loader process takes of one block."""

    epoch: int
    first_step: int
    """The first step that needs some of it."""
    block: Block
    rows: NDArray[np.int32]
    """(shard number, sample number within the shard) in the order of the steps (R, 2)."""


def plan_portions(order: EpochOrder, epoch: int, slots: tuple[int, int], first_step: int) -> Iterator[Portion]:
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


def plan_ranges(offsets: Sequence[int], sizes: Sequence[int], shard_bytes: int) -> list[tuple[int, int]]:
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
