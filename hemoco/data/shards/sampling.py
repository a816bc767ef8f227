"""Evenly spaced samples of a shard folder, read by their own bytes only, and counts of labels."""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hemoco.data.shards.index import Shard, ShardIndex, read_table, read_tables, shard_url
from hemoco.data.shards.table import crc32c
from hemoco.errors import ShardError
from hemoco.storage.fetch import FetchCounts, fetch_range

_THREADS = 16


class SpreadSample(NamedTuple):
    """A sample with its split."""

    image: bytes
    """Encoded, as it was packed."""
    key: str
    label: int
    """-1 where there is none."""
    split: str


def spread_samples(url: str, shards: Sequence[Shard], count: int) -> list[SpreadSample]:
    """Evenly spaced samples of some shards, in their order; all samples where there are fewer.

    Args:
        url: URL of the shard folder.
        shards: some of its index.
        count: samples to read.

    Raises:
        ShardError: a table is missing or damaged, or a sample's bytes are not the packed ones.
        StorageError: the storage refuses or does not answer.
    """
    rows_by_shard = _evenly_spaced([shard.samples for shard in shards], count)
    with ThreadPoolExecutor(_THREADS) as threads:
        results = threads.map(
            lambda number: _read_samples(url, shards[number], rows_by_shard[number]), rows_by_shard
        )
        return [sample for samples in results for sample in samples]


def _evenly_spaced(sizes: Sequence[int], count: int) -> dict[int, list[int]]:
    """Rows of `count` evenly spaced samples in each shard, by shard number; of all if fewer."""
    starts = list(accumulate(sizes, initial=0))
    total = starts[-1]
    count = min(count, total)
    rows_by_shard: dict[int, list[int]] = {}
    for number in range(count):
        position = number * total // count
        shard = bisect_right(starts, position) - 1
        rows_by_shard.setdefault(shard, []).append(position - starts[shard])
    return rows_by_shard


def _read_samples(url: str, shard: Shard, rows: Sequence[int]) -> list[SpreadSample]:
    table = read_table(url, shard)
    tar_url = shard_url(url, shard)
    samples = []
    for row in rows:
        offset, size = int(table.offsets[row]), int(table.sizes[row])
        data = bytes(fetch_range(tar_url, offset, offset + size, FetchCounts()))
        if crc32c(data) != table.crcs[row]:
            raise ShardError(
                f"{tar_url}: sample {table.keys[row]} at byte {offset} is damaged or was replaced"
            )
        samples.append(SpreadSample(data, table.keys[row], int(table.labels[row]), shard.split))
    return samples


def count_labels(url: str, index: ShardIndex) -> dict[str, NDArray[np.int64]]:
    """Images of each class in each split.

    Returns:
        For each split counts (C + 1,) of the C classes and, last, of the images without a label.

    Raises:
        ShardError: a table is missing, damaged, or has labels beyond the classes.
        StorageError: the storage refuses or does not answer.
    """
    classes = len(index.classes)
    counts = {split: np.zeros(classes + 1, np.int64) for split in index.splits}
    for shard, table in zip(index.shards, read_tables(url, index.shards), strict=True):
        largest = table.labels.max(initial=-1)
        if largest >= classes:
            raise ShardError(
                f"{shard.name}: label {largest}, the index has {classes} classes; "
                "pack the data again"
            )
        columns = np.where(table.labels < 0, classes, table.labels)
        counts[shard.split] += np.bincount(columns, minlength=classes + 1)
    return counts
