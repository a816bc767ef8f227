"""Samples out of the bytes of a shard, and whether they are the ones that were packed.

A shard whose bytes are not the packed ones is either damaged, and its sound samples can be used, or another shard,
which is an error. Here alone stands which of the two it is.

Shapes: M samples of a shard.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.index import Shard
from hemoco.data.shards.table import SampleTable, crc32c
from hemoco.errors import ShardError, StorageError
from hemoco.storage.fetch import ChecksumError, FetchCounts, ObjectCutError, fetch_range

_FEW = 3  # damaged samples that say nothing about the rest of their shard


def cut_out(
    parts: list[tuple[int, memoryview]], table: SampleTable, wanted: NDArray[np.int32]
) -> list[tuple[int, memoryview]]:
    """The images at some places of a shard, out of parts of it that begin at ascending bytes."""
    images = []
    for place in wanted.tolist():
        offset, size = int(table.offsets[place]), int(table.sizes[place])
        start, data = next(part for part in reversed(parts) if part[0] <= offset)
        images.append((place, data[offset - start : offset - start + size]))
    return images


def damaged_places(images: Iterable[tuple[int, memoryview]], table: SampleTable) -> frozenset[int]:
    """Places of those images that are not the packed ones, as their CRC32C shows."""
    return frozenset(place for place, image in images if crc32c(image) != table.crcs[place])


def is_another_shard(*, examined: int, damaged: int, samples: int) -> bool:
    """Whether so many samples are damaged that the shard was replaced and not damaged.

    That is more than half of those examined, and more than three unless these are all that the shard has.

    Args:
        examined: samples whose bytes were compared.
        damaged: those of them that are not the packed ones.
        samples: of the shard.
    """
    return damaged > max(examined // 2, min(_FEW, samples - 1))


class WholeShard(NamedTuple):
    """The bytes of a shard, and what is wrong with them."""

    data: memoryview
    damaged: frozenset[int]
    """Places of the samples that are not the packed ones."""
    flaw: str
    """How the checksum differs; empty where it holds."""


def whole_shard(
    where: str,
    shard: Shard,
    table: SampleTable,
    verified: Callable[[], memoryview],
    counts: FetchCounts,
    *,
    budget_s: float,
) -> WholeShard:
    """A whole shard; of one that was damaged in storage the sound samples can be used.

    Args:
        where: URL of the shard.
        shard: as the index has it.
        table: of its samples.
        verified: gets its bytes, or raises ChecksumError.
        counts: what fetching takes is added to it.
        budget_s: seconds without a new byte after which fetching gives up.

    Raises:
        ShardError: it is missing, or another one than was packed.
        StorageError: the storage refuses, or nothing came for `budget_s`.
    """
    try:
        return WholeShard(verified(), frozenset(), "")
    except ChecksumError as error:
        data = fetch_part(where, 0, shard.bytes, counts, budget_s=budget_s)
        images = cut_out([(0, data)], table, np.arange(shard.samples, dtype=np.int32))
        damaged = damaged_places(images, table)
        if is_another_shard(examined=shard.samples, damaged=len(damaged), samples=shard.samples):
            raise
        return WholeShard(data, damaged, str(error))


def fetch_part(
    where: str,
    start: int,
    stop: int,
    counts: FetchCounts,
    *,
    budget_s: float,
    into: memoryview | None = None,
) -> memoryview:
    """The bytes [start, stop) of the shard at a URL, as `fetch_range`.

    Raises:
        ShardError: it is missing or cut.
        StorageError: the storage refuses, or nothing came for `budget_s`.
    """
    try:
        return fetch_range(where, start, stop, counts, budget_s=budget_s, into=into)
    except StorageError as error:
        if isinstance(error, ObjectCutError) or isinstance(error.__cause__, FileNotFoundError):
            raise ShardError(
                f"{error}: a shard is missing or cut; restore it or pack the data again"
            ) from error
        raise
