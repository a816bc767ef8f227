"""Some samples of a shard folder, evenly spaced, of which only their own bytes are read."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from operator import itemgetter
from typing import NamedTuple

import google_crc32c

from hemoco.data.shards.index import Shard, read_table, shard_url
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
        found = threads.map(lambda number: _read_samples(url, shards[number], chosen[number]), chosen)
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
        if google_crc32c.value(data) != table.crcs[row]:
            raise ShardError(f"{where}: sample {table.keys[row]} at byte {offset} is damaged or was replaced")
        samples.append(SpreadSample(data, table.keys[row], int(table.labels[row]), shard.split))
    return samples
