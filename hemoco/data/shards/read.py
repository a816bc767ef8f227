"""Samples from the bytes of a shard, and the rule that tells damaged shards from replaced ones.

Of a shard that was damaged in storage, the sound samples can still be used. A shard that was
replaced by another is an error. `is_another_shard` is the only place that decides which it is.

Shapes: M samples of a shard.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.index import Shard
from hemoco.data.shards.table import SampleTable, crc32c
from hemoco.errors import ShardError, StorageError
from hemoco.storage.fetch import ChecksumError, FetchCounts, ObjectCutError, fetch_range

_TOLERATED_DAMAGE = 3  # so few damaged samples never mean that the shard was replaced
_REQUEST_BYTES = 1 << 20  # a request takes about as long as receiving this many bytes


def plan_ranges(
    offsets: Sequence[int], sizes: Sequence[int], shard_bytes: int
) -> list[tuple[int, int]]:
    """Byte ranges [start, stop), ascending, that hold some samples of a shard at the least cost.

    A gap between two samples is read along with them where that is cheaper than a further request.

    Args:
        offsets: first byte of each sample, in any order.
        sizes: bytes of each sample.
        shard_bytes: bytes of the shard.

    Returns:
        The ranges; the whole shard as one range where that is cheaper.
    """
    ranges: list[tuple[int, int]] = []
    for start, size in sorted(zip(offsets, sizes, strict=True)):
        stop = start + size
        if ranges and start - ranges[-1][1] <= _REQUEST_BYTES:
            last_start, last_stop = ranges.pop()
            ranges.append((last_start, max(last_stop, stop)))
        else:
            ranges.append((start, stop))
    cost = sum(stop - start for start, stop in ranges) + (len(ranges) - 1) * _REQUEST_BYTES
    # A whole shard is verified with one checksum, ranges with one for each sample. Reading ranges
    # must save more than that costs: the bytes of one request at least.
    if cost + _REQUEST_BYTES < shard_bytes:
        return ranges
    return [(0, shard_bytes)]


def cut_out(
    parts: list[tuple[int, memoryview]], table: SampleTable, rows: NDArray[np.int32]
) -> list[tuple[int, memoryview]]:
    """Encoded images of some samples, cut out of parts of their shard without copying.

    Args:
        parts: first byte and bytes of each part, ascending; together they hold all the samples.
        table: table of the shard's samples.
        rows: rows of the table, one for each sample.

    Returns:
        Row and image of each sample, in the order of `rows`.
    """
    images = []
    for row in rows.tolist():
        offset, size = int(table.offsets[row]), int(table.sizes[row])
        start, data = next(part for part in reversed(parts) if part[0] <= offset)
        images.append((row, data[offset - start : offset - start + size]))
    return images


def damaged_rows(images: Iterable[tuple[int, memoryview]], table: SampleTable) -> frozenset[int]:
    """Rows of those images whose CRC32C differs from the table's."""
    return frozenset(row for row, image in images if crc32c(image) != table.crcs[row])


def is_another_shard(*, examined: int, damaged: int, samples: int) -> bool:
    """Returns True if so many samples are damaged that the shard must have been replaced.

    That is more than half of the examined samples, and more than three (in a shard of three samples
    or fewer: all of them).

    Args:
        examined: samples whose bytes were compared.
        damaged: examined samples whose bytes differ from the packed ones.
        samples: in the shard.
    """
    return damaged > max(examined // 2, min(_TOLERATED_DAMAGE, samples - 1))


class WholeShard(NamedTuple):
    """The bytes of a shard, and what is wrong with them."""

    data: memoryview
    damaged: frozenset[int]
    """Table rows of the damaged samples."""
    flaw: str
    """The difference of the shard's checksum; empty if it matches."""


def whole_shard(
    url: str,
    shard: Shard,
    table: SampleTable,
    verified: Callable[[], memoryview],
    counts: FetchCounts,
    *,
    budget_s: float,
) -> WholeShard:
    """A whole shard with the rows of its damaged samples.

    Args:
        url: URL of the shard.
        shard: its entry in the index.
        table: table of the shard's samples.
        verified: returns its bytes, or raises ChecksumError.
        counts: receives what fetching takes.
        budget_s: seconds without a new byte after which fetching gives up.

    Raises:
        ShardError: the shard is missing, or was replaced by another.
        StorageError: the storage refuses, or nothing came for `budget_s`.
    """
    try:
        return WholeShard(verified(), frozenset(), "")
    except ChecksumError as error:
        # `verified` keeps no bytes that fail the checksum, so they are fetched once more
        data = fetch_part(url, 0, shard.bytes, counts, budget_s=budget_s)
        images = cut_out([(0, data)], table, np.arange(shard.samples, dtype=np.int32))
        damaged = damaged_rows(images, table)
        if is_another_shard(examined=shard.samples, damaged=len(damaged), samples=shard.samples):
            raise
        return WholeShard(data, damaged, str(error))


def fetch_part(
    url: str,
    start: int,
    stop: int,
    counts: FetchCounts,
    *,
    budget_s: float,
    into: memoryview | None = None,
) -> memoryview:
    """The bytes [start, stop) of the shard at a URL; see `fetch_range`.

    Raises:
        ShardError: the shard is missing or cut.
        StorageError: the storage refuses, or nothing came for `budget_s`.
    """
    try:
        return fetch_range(url, start, stop, counts, budget_s=budget_s, into=into)
    except StorageError as error:
        if isinstance(error, ObjectCutError) or isinstance(error.__cause__, FileNotFoundError):
            raise ShardError(
                f"{error}: a shard is missing or cut; restore it or pack the data again"
            ) from error
        raise
