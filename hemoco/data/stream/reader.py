"""The samples of one loader process, read ahead in the order in which they are needed, each block once.

A process takes a part of some lanes: of every block of these lanes, its portion. Threads fetch the coming portions
while the present ones are decoded. A shard is read whole where that is cheaper or where a cache keeps it for others,
and told by its SHA-256 when this process first does so. Samples of ranges, and of a shard that was proved before, are
told by their CRC32C, at a seventh of the cost.

Shapes: R samples of a portion.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hemoco.config import StreamConfig
from hemoco.data.decode import UndecodableImage, decode_image
from hemoco.data.shards.index import Shard, ShardColumns, read_table, shard_url
from hemoco.data.shards.read import (
    WholeShard,
    cut_out,
    damaged_places,
    fetch_part,
    is_another_shard,
    whole_shard,
)
from hemoco.data.shards.table import SampleTable, crc32c
from hemoco.data.shards.tar import IMAGE_SUFFIXES
from hemoco.data.stream.bad_samples import DAMAGED, BadSample, ReadCounts
from hemoco.data.stream.order import Portion, plan_ranges
from hemoco.data.stream.shard_cache import ShardCache
from hemoco.errors import ShardError
from hemoco.storage.fetch import FetchCounts, verified_shard
from hemoco.storage.retry import patiently

logger = logging.getLogger(__name__)

_THREADS = 4


class ReadSample(NamedTuple):
    """An encoded image."""

    shard: str
    """URL of the tar."""
    key: str
    image: memoryview
    suffix: str
    label: int
    """-1 where there is none."""
    sound: bool
    """Whether the bytes are those that were packed."""


Pieces = Iterable[tuple[int, int, int]]
Decoded = TypeVar("Decoded")
_Samples = dict[tuple[int, int], ReadSample]


class _Read(NamedTuple):
    samples: _Samples
    memory: list[NDArray[np.uint8]]
    """What the samples lie in, as far as it can be used again."""


class _Open(NamedTuple):
    portion: Portion
    size: int
    read: "AsyncResult[_Read]"


class SampleReader:
    """Reads portions ahead and gives the images of one step after the other.

    Holds at most `config.memory_bytes` of shards, beside what the present step needs and, while it is received, one
    shard for each of 4 threads.

    Args:
        url: of the shard folder.
        shards: of the split.
        portions: as `plan_portions` gives them, of one epoch after the other.
        config: of the stream.
        cache: of the node, or None.
    """

    def __init__(
        self,
        url: str,
        shards: ShardColumns,
        portions: Iterable[Portion],
        *,
        config: StreamConfig,
        cache: ShardCache | None,
    ) -> None:
        self._url, self._shards, self._config, self._cache = url, shards, config, cache
        self._fetched = FetchCounts()  # of all threads
        self._counted = ReadCounts()  # of it, what `take_counts` has given
        self._coming = iter(portions)
        self._next: Portion | None = next(self._coming, None)
        self._open: dict[int, deque[_Open]] = {}  # by lane; the first is the present one
        self._taken: dict[int, int] = {}  # rows of the present portion that are used up
        self._held = 0
        self._idle: list[
            NDArray[np.uint8]
        ] = []  # memory for shards; cleared pages cost a quarter of reading
        self._done: list[_Open] = []  # used up in the present step
        self._pool: ThreadPool | None = None
        self._damaged: set[str] = set()
        self._proved: set[int] = set()  # shards
        self._read = 0
        self._bad: list[BadSample] = []

    def close(self) -> None:
        """Lets go of the threads; one that waits for the storage ends when its patience does."""
        if self._pool is not None:
            self._pool.terminate()

    def images(self, epoch: int, step: int, pieces: Pieces) -> Iterator[tuple[ReadSample, Tensor]]:
        """Sample and image (3, H, W) of each slot of a step; steps must be asked for in their order.

        Args:
            epoch: of the step.
            step: within the epoch.
            pieces: lanes with their part [begin, end) of its slice, as `EpochOrder.slices` gives them.

        Raises:
            ShardError: a shard is not what the index says, or none of its images can be decoded.
            StorageError: the storage refuses, or did not answer in time.
        """
        yield from self._usable(epoch, step, pieces, lambda encoded: decode_image(bytes(encoded)))

    def encoded(self, epoch: int, step: int, pieces: Pieces) -> Iterator[ReadSample]:
        """As `images`, but the samples as they were packed; only damaged ones are replaced.

        Their bytes are to be copied before the next step is asked for.
        """
        for read, _ in self._usable(epoch, step, pieces, lambda encoded: encoded):
            yield read

    def take_counts(self) -> ReadCounts:
        """What was read since this was asked last."""
        fetched = self._fetched
        now = ReadCounts(
            samples=self._read,
            bytes=fetched.bytes,
            requests=fetched.requests,
            retries=fetched.retries,
            cache_hits=fetched.cache_hits,
            cache_misses=fetched.cache_misses,
        )
        since = now.since(self._counted)._replace(bad=tuple(self._bad))
        self._counted, self._bad = now, []
        return since

    def _read_ahead(self, epoch: int, step: int) -> None:
        """Begins to read what this step needs, and what comes after it as far as memory allows."""
        while self._next is not None:
            portion = self._next
            due = (portion.epoch, portion.first_step) <= (epoch, step)
            size = self._size(portion)
            ahead = len(self._open.get(portion.block.lane, ()))
            if not due and (ahead > 1 or self._held + size > self._config.memory_bytes):
                return
            # threads are made late: a forked process would inherit none
            self._pool = self._pool or ThreadPool(_THREADS)
            opened = _Open(portion, size, self._pool.apply_async(self._read_portion, (portion,)))
            self._open.setdefault(portion.block.lane, deque()).append(opened)
            self._held += size
            self._next = next(self._coming, None)

    def _usable(
        self, epoch: int, step: int, pieces: Pieces, decode: Callable[[memoryview], Decoded]
    ) -> Iterator[tuple[ReadSample, Decoded]]:
        while self._done:
            self._idle += self._done.pop().read.get().memory
        self._read_ahead(epoch, step)
        for lane, begin, end in pieces:
            for _ in range(end - begin):
                yield self._take(lane, decode)

    def _take(
        self, lane: int, decode: Callable[[memoryview], Decoded]
    ) -> tuple[ReadSample, Decoded]:
        waiting, used = self._open[lane], self._taken.get(lane, 0)
        present = waiting[0]
        self._taken[lane] = (used + 1) % len(present.portion.rows)
        if self._taken[lane] == 0:
            self._held -= waiting.popleft().size
            self._done.append(present)
        self._read += 1
        shard, number = present.portion.rows[used].tolist()
        return self._good(shard, number, present.read.get().samples, decode)

    def _good(
        self, shard: int, number: int, samples: _Samples, decode: Callable[[memoryview], Decoded]
    ) -> tuple[ReadSample, Decoded]:
        """A sample, or the next good one of its shard: its own content alone decides which."""
        count = int(self._shards.samples[shard])
        for offset in range(count):
            place = (number + offset) % count
            read = samples.get((shard, place)) or self._read_single(shard, place)
            flaw = DAMAGED
            try:
                if read.sound:
                    return read, decode(read.image)
            except UndecodableImage as error:
                flaw = error.reason
            if offset == 0:
                self._bad.append(
                    BadSample(shard_url(self._url, self._shards[shard]), read.key, flaw)
                )
        raise ShardError(
            f"{shard_url(self._url, self._shards[shard])}: none of its images can be decoded; repack it"
        )

    def _size(self, portion: Portion) -> int:
        """Bytes that reading a portion will hold, at most about."""
        numbers, wanted = np.unique(portion.rows[:, 0], return_counts=True)
        share = wanted / self._shards.samples[numbers]
        return int((self._shards.bytes[numbers] * np.where(share < 0.5, share, 1)).sum())

    def _read_portion(self, portion: Portion) -> _Read:
        """Runs in a thread."""
        found = _Read({}, [])
        for number in np.unique(portion.rows[:, 0]).tolist():
            wanted = portion.rows[portion.rows[:, 0] == number, 1]
            found.samples.update(
                {
                    (number, place): read
                    for place, read in self._read_shard(number, wanted, found.memory)
                }
            )
        return found

    def _read_shard(
        self, number: int, wanted: NDArray[np.int32], memory: list[NDArray[np.uint8]]
    ) -> Iterator[tuple[int, ReadSample]]:
        """The wanted samples with their places; what they lie in is added to `memory` if it is to be kept."""
        shard = self._shards[number]
        table = self._table(shard)
        ranges = plan_ranges(
            table.offsets[wanted].tolist(), table.sizes[wanted].tolist(), shard.bytes
        )
        few, whole = 2 * len(wanted) < shard.samples, ranges == [(0, shard.bytes)]
        piece = self._take_memory(shard.bytes) if whole and self._cache is None else None
        if self._cache is not None or (whole and number not in self._proved):
            read = self._read_whole(shard, table, piece)
            images, doubtful = cut_out([(0, read.data)], table, wanted), read.damaged
            if not read.flaw:
                self._proved.add(number)
        else:
            try:
                images, doubtful = self._read_ranges(shard, table, wanted, ranges, piece)
            except ShardError:  # once more: it may have been replaced while it was read
                images, doubtful = self._read_ranges(shard, table, wanted, ranges, piece)
        for place, image in images:
            # a copy lets go of the rest of the shard, which others use
            kept = memoryview(bytes(image)) if few else image
            yield place, self._checked(shard, table, place, kept, proved=place not in doubtful)
        if piece is not None:
            (self._idle if few else memory).append(piece)

    def _table(self, shard: Shard) -> SampleTable:
        def ask() -> SampleTable:
            return read_table(self._url, shard)

        try:
            return patiently(ask, self._config.retry_s)
        except ShardError:  # once more: it may have been damaged on its way
            return patiently(ask, self._config.retry_s)

    def _read_ranges(
        self,
        shard: Shard,
        table: SampleTable,
        wanted: NDArray[np.int32],
        ranges: list[tuple[int, int]],
        piece: NDArray[np.uint8] | None,
    ) -> tuple[list[tuple[int, memoryview]], frozenset[int]]:
        """Samples of a shard by ranges, and which of them are not what was packed.

        Raises:
            ShardError: it is missing, or another one than was packed.
        """
        images = cut_out(
            [(start, self._fetch(shard, start, stop, piece)) for start, stop in ranges],
            table,
            wanted,
        )
        damaged = damaged_places(images, table)
        if is_another_shard(examined=len(images), damaged=len(damaged), samples=shard.samples):
            raise ShardError(
                f"{shard_url(self._url, shard)}: {len(damaged)} of {len(images)} samples are others than were packed: "
                "it was replaced or damaged; restore it or pack the data again"
            )
        return images, damaged

    def _read_whole(
        self, shard: Shard, table: SampleTable, piece: NDArray[np.uint8] | None
    ) -> WholeShard:
        where, budget_s = shard_url(self._url, shard), self._config.retry_s

        def verified() -> memoryview:
            if self._cache is not None:
                return memoryview(
                    self._cache.open(
                        where, shard.bytes, shard.sha256, self._fetched, budget_s=budget_s
                    )
                )
            into = None if piece is None else piece[: shard.bytes].data
            return verified_shard(
                where, shard.bytes, shard.sha256, self._fetched, budget_s=budget_s, into=into
            )

        read = whole_shard(where, shard, table, verified, self._fetched, budget_s=budget_s)
        if read.flaw and where not in self._damaged:
            self._damaged.add(where)
            logger.warning(
                "event=damaged_shard samples=%d damaged=%d %s",
                shard.samples,
                len(read.damaged),
                read.flaw,
            )
        return read

    def _take_memory(self, size: int) -> NDArray[np.uint8]:
        """At least so many bytes: an idle piece, else a new one in place of one that is too small."""
        try:
            piece = self._idle.pop()
        except IndexError:  # none, or another thread took it
            return np.empty(size, np.uint8)
        return piece if len(piece) >= size else np.empty(size, np.uint8)

    def _read_single(self, number: int, place: int) -> ReadSample:
        """A sample by a request of its own."""
        shard = self._shards[number]
        table = self._table(shard)
        start = int(table.offsets[place])
        image = self._fetch(shard, start, start + int(table.sizes[place]))
        return self._checked(shard, table, place, image, proved=False)

    def _checked(
        self, shard: Shard, table: SampleTable, place: int, image: memoryview, *, proved: bool
    ) -> ReadSample:
        crc = int(table.crcs[place])
        sound = proved or crc32c(image) == crc
        if not sound:  # once more: it may have been damaged on its way
            start = int(table.offsets[place])
            image = self._fetch(shard, start, start + int(table.sizes[place]))
            sound = crc32c(image) == crc
        return ReadSample(
            shard=shard_url(self._url, shard),
            key=table.keys[place],
            image=image,
            suffix=IMAGE_SUFFIXES[table.suffixes[place]],
            label=int(table.labels[place]),
            sound=sound,
        )

    def _fetch(
        self, shard: Shard, start: int, stop: int, piece: NDArray[np.uint8] | None = None
    ) -> memoryview:
        """The bytes [start, stop) of a shard, in the memory of a piece or in new memory."""
        where, into = (
            shard_url(self._url, shard),
            None if piece is None else piece[: stop - start].data,
        )
        return fetch_part(
            where, start, stop, self._fetched, budget_s=self._config.retry_s, into=into
        )
