"""Some samples of a shard folder, evenly spaced, of which only their own bytes are read."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.index import Shard, ShardIndex, read_table, read_tables, shard_url
from hemoco.data.shards.table import crc32c
from hemoco.errors import ShardError
from hemoco.storage.fetch import FetchCounts, fetch_range

_THREADS = 16


class SpreadSample(NamedTuple):
    """One of them."""

    image: bytes
    """Encoded, as it was packed."""
    key: str
    label: int
    """-1 where there is none."""
    split: str


def spread_samples(url: str, shards: Sequence[Shard], count: int) -> list[SpreadSample]:
    """Evenly spaced samples of some shards, in their order; all samples where there are fewer.

    Args:
        url: of the shard folder.
        shards: some of its index.
        count: how many.

    Raises:
        ShardError: a table is missing or damaged, or the bytes of a sample are not those that were packed.
        StorageError: the storage refuses or does not answer.
    """
    places = _spread([shard.samples for shard in shards], count)
    chosen = {number: [row for _, row in rows] for number, rows in groupby(places, itemgetter(0))}
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(
            lambda number: _read_samples(url, shards[number], chosen[number]), chosen
        )
        return [sample for samples in found for sample in samples]


def _spread(sizes: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """(shard number, row) of `count` samples evenly spaced over shards of these sizes; of all where there are fewer."""
    ends = list(accumulate(sizes, initial=0))
    count = min(count, ends[-1])
    for place in (number * ends[-1] // count for number in range(count)):
        shard = bisect_right(ends, place) - 1
        yield shard, place - ends[shard]


def _read_samples(url: str, shard: Shard, rows: Sequence[int]) -> list[SpreadSample]:
    table, where = read_table(url, shard), shard_url(url, shard)
    samples = []
    for row in rows:
        offset, size = int(table.offsets[row]), int(table.sizes[row])
        data = bytes(fetch_range(where, offset, offset + size, FetchCounts()))
        if crc32c(data) != table.crcs[row]:
            raise ShardError(
                f"{where}: sample {table.keys[row]} at byte {offset} is damaged or was replaced"
            )
        samples.append(SpreadSample(data, table.keys[row], int(table.labels[row]), shard.split))
    return samples


def count_labels(url: str, index: ShardIndex) -> dict[str, NDArray[np.int64]]:
    """For each split the images of each class and, last, those without a label (C + 1,).

    Raises:
        ShardError: a table is missing, damaged, or has labels beyond the classes.
        StorageError: the storage refuses or does not answer.
    """
    counts = {split: np.zeros(len(index.classes) + 1, np.int64) for split in index.splits}
    for shard, table in zip(index.shards, read_tables(url, index.shards), strict=True):
        counts[shard.split] += _count(shard, table.labels, len(index.classes))
    return counts


def _count(shard: Shard, labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    if labels.max(initial=-1) >= classes:
        raise ShardError(
            f"{shard.name}: label {labels.max()}, the index has {classes} classes; pack the data again"
        )
    return np.bincount(np.where(labels < 0, classes, labels), minlength=classes + 1).astype(
        np.int64
    )
