"""The samples of one loader process, read ahead in the order in which the steps need them.

A process owns a part of some lanes and reads, of each block of these lanes, its portion once.
Threads fetch the coming portions while the images of the present ones are decoded.

A shard is read whole where that is cheaper than ranges, or where the disk cache keeps it for other
processes. A shard is verified by its SHA-256 the first time this process reads it whole. Ranges,
and shards that were verified before, are verified sample by sample: their CRC32C takes a seventh of
the CPU time of a SHA-256.

Shapes: R samples in a portion, H x W an image. A row is a sample's row in the table of its shard.
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
    damaged_rows,
    fetch_part,
    is_another_shard,
    plan_ranges,
    whole_shard,
)
from hemoco.data.shards.table import SampleTable, crc32c
from hemoco.data.shards.tar import IMAGE_SUFFIXES
from hemoco.data.stream.bad_samples import DAMAGED, BadSample, ReadCounts
from hemoco.data.stream.order import LaneSlice, Portion
from hemoco.data.stream.shard_cache import ShardCache
from hemoco.errors import ShardError
from hemoco.storage.fetch import FetchCounts, verified_shard
from hemoco.storage.retry import patiently

logger = logging.getLogger(__name__)

_THREADS = 4


class ReadSample(NamedTuple):
    """An encoded image with its key and label."""

    shard: str
    """URL of the tar."""
    key: str
    image: memoryview
    suffix: str
    label: int
    """-1 where there is none."""
    sound: bool
    """True if the bytes are those that were packed."""


Decoded = TypeVar("Decoded")
_SamplesByRow = dict[tuple[int, int], ReadSample]
"""Samples by shard number and row."""
_Buffer = NDArray[np.uint8]


class _PortionSamples(NamedTuple):
    samples: _SamplesByRow
    buffers: list[_Buffer]
    """Memory in which the samples lie; it can be used again when the portion is used up."""


class _OpenPortion(NamedTuple):
    portion: Portion
    size: int
    """Bytes that it holds, about."""
    result: "AsyncResult[_PortionSamples]"


class SampleReader:
    """Reads portions ahead and yields the images of one step after the other.

    Holds at most `config.memory_bytes` of shards in advance. What the present step needs is held in
    any case, and one more shard for each of 4 threads while it is received.

    Args:
        url: URL of the shard folder.
        shards: shards of the split.
        portions: portions of one epoch after the other, as `plan_portions` yields them.
        config: settings of the stream.
        cache: shard cache of this node, or None.
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
        self._url = url
        self._shards = shards
        self._config = config
        self._cache = cache
        self._portions = iter(portions)
        self._next_portion: Portion | None = next(self._portions, None)
        # Portions that are being read, by lane. The first of each lane is the present one.
        self._open: dict[int, deque[_OpenPortion]] = {}
        self._used_rows: dict[int, int] = {}  # of the present portion of each lane
        self._held_bytes = 0
        self._used_up: list[_OpenPortion] = []  # in the present step, whose images are still in use
        # Buffers to use again. The kernel clears each page of new memory, which takes a quarter of
        # the time of reading.
        self._idle_buffers: list[_Buffer] = []
        self._pool: ThreadPool | None = None
        self._verified_shards: set[int] = set()
        self._damage_logged: set[str] = set()
        self._fetched = FetchCounts()  # by all threads
        self._counted = ReadCounts()  # the part that `take_counts` has returned
        self._samples_read = 0
        self._bad: list[BadSample] = []

    def close(self) -> None:
        """Ends the threads. One that waits for the storage ends after `config.retry_s` at most."""
        if self._pool is not None:
            self._pool.terminate()

    def images(
        self, epoch: int, step: int, slices: Iterable[LaneSlice]
    ) -> Iterator[tuple[ReadSample, Tensor]]:
        """Sample and image (3, H, W) of each slot of a step; steps must be read in their order.

        Args:
            epoch: epoch that the step belongs to.
            step: within the epoch.
            slices: parts of lanes to read, as `EpochOrder.slices` yields them.

        Raises:
            ShardError: a shard is missing or was replaced, or none of its images can be decoded.
            StorageError: the storage refuses, or did not answer in time.
        """
        yield from self._usable(epoch, step, slices, lambda encoded: decode_image(bytes(encoded)))

    def encoded(self, epoch: int, step: int, slices: Iterable[LaneSlice]) -> Iterator[ReadSample]:
        """Samples of a step as they were packed; like `images`, but only damaged ones are replaced.

        Their bytes must be copied before the next step is read, which uses their memory again.
        """
        for sample, _ in self._usable(epoch, step, slices, lambda encoded: encoded):
            yield sample

    def take_counts(self) -> ReadCounts:
        """Counts of what was read since the last call."""
        fetched = self._fetched
        now = ReadCounts(
            samples=self._samples_read,
            bytes=fetched.bytes,
            requests=fetched.requests,
            retries=fetched.retries,
            cache_hits=fetched.cache_hits,
            cache_misses=fetched.cache_misses,
        )
        since = now.since(self._counted)._replace(bad=tuple(self._bad))
        self._counted, self._bad = now, []
        return since

    def _usable(
        self,
        epoch: int,
        step: int,
        slices: Iterable[LaneSlice],
        decode: Callable[[memoryview], Decoded],
    ) -> Iterator[tuple[ReadSample, Decoded]]:
        while self._used_up:
            self._idle_buffers += self._used_up.pop().result.get().buffers
        self._read_ahead(epoch, step)
        for lane, start, stop in slices:
            for _ in range(start, stop):
                yield self._take(lane, decode)

    def _read_ahead(self, epoch: int, step: int) -> None:
        """Starts reading what this step needs, and what comes after it as far as memory allows."""
        while self._next_portion is not None:
            portion = self._next_portion
            lane = portion.block.lane
            size = self._portion_bytes(portion)
            needed_now = (portion.epoch, portion.first_step) <= (epoch, step)
            fits = self._held_bytes + size <= self._config.memory_bytes
            if not needed_now and (len(self._open.get(lane, ())) > 1 or not fits):
                return
            # Threads are started only here: a process forked after __init__ would not have them.
            self._pool = self._pool or ThreadPool(_THREADS)
            result = self._pool.apply_async(self._read_portion, (portion,))
            self._open.setdefault(lane, deque()).append(_OpenPortion(portion, size, result))
            self._held_bytes += size
            self._next_portion = next(self._portions, None)

    def _portion_bytes(self, portion: Portion) -> int:
        """Bytes that a portion holds once it is read, approximately and rather too many."""
        numbers, wanted = np.unique(portion.rows[:, 0], return_counts=True)
        share = wanted / self._shards.samples[numbers]
        # of a shard of which less than half is wanted, `_read_shard` keeps copies of single samples
        held_share = np.where(share < 0.5, share, 1)
        return int((self._shards.bytes[numbers] * held_share).sum())

    def _take(
        self, lane: int, decode: Callable[[memoryview], Decoded]
    ) -> tuple[ReadSample, Decoded]:
        """The next sample of a lane."""
        portions = self._open[lane]
        present = portions[0]
        used = self._used_rows.get(lane, 0)
        self._used_rows[lane] = used + 1
        if used + 1 == len(present.portion.rows):
            self._used_rows[lane] = 0
            portions.popleft()
            self._held_bytes -= present.size
            self._used_up.append(present)
        self._samples_read += 1
        shard_number, row = present.portion.rows[used].tolist()
        return self._first_good(shard_number, row, present.result.get().samples, decode)

    def _first_good(
        self,
        shard_number: int,
        row: int,
        samples: _SamplesByRow,
        decode: Callable[[memoryview], Decoded],
    ) -> tuple[ReadSample, Decoded]:
        """A sample, or instead of a bad one the next good one of its shard.

        The content of the shard alone decides which sample it is, so the order stays the same for
        every number of ranks.
        """
        count = int(self._shards.samples[shard_number])
        for offset in range(count):
            candidate = (row + offset) % count
            sample = samples.get((shard_number, candidate))
            if sample is None:
                sample = self._read_single(shard_number, candidate)
            flaw = DAMAGED
            try:
                if sample.sound:
                    return sample, decode(sample.image)
            except UndecodableImage as error:
                flaw = error.reason
            if offset == 0:  # those skipped after it are not of this step
                self._bad.append(BadSample(sample.shard, sample.key, flaw))
        raise ShardError(
            f"{shard_url(self._url, self._shards[shard_number])}: "
            "none of its images can be decoded; repack it"
        )

    def _read_portion(self, portion: Portion) -> _PortionSamples:
        """Samples of a portion; runs in a thread of the pool."""
        read = _PortionSamples({}, [])
        for number in np.unique(portion.rows[:, 0]).tolist():
            wanted = portion.rows[portion.rows[:, 0] == number, 1]
            for row, sample in self._read_shard(number, wanted, read.buffers):
                read.samples[number, row] = sample
        return read

    def _read_shard(
        self, number: int, wanted: NDArray[np.int32], buffers: list[_Buffer]
    ) -> Iterator[tuple[int, ReadSample]]:
        """The wanted rows of a shard; adds the buffer in which they lie, if any, to `buffers`."""
        shard = self._shards[number]
        table = self._table(shard)
        offsets, sizes = table.offsets[wanted].tolist(), table.sizes[wanted].tolist()
        ranges = plan_ranges(offsets, sizes, shard.bytes)
        whole = ranges == [(0, shard.bytes)]
        # the cache maps its files: they need no buffer
        buffer = self._take_buffer(shard.bytes) if whole and self._cache is None else None
        if self._cache is not None or (whole and number not in self._verified_shards):
            read = self._read_whole(shard, table, buffer)
            images = cut_out([(0, read.data)], table, wanted)
            unverified = read.damaged
            if not read.flaw:
                self._verified_shards.add(number)
        else:
            try:
                images, unverified = self._read_ranges(shard, table, wanted, ranges, buffer)
            except ShardError:  # once more: the shard may have been replaced between two ranges
                images, unverified = self._read_ranges(shard, table, wanted, ranges, buffer)
        copied = 2 * len(wanted) < shard.samples
        for row, image in images:
            if copied:  # the few wanted samples would hold the memory of the whole shard
                image = memoryview(bytes(image))
            yield row, self._sample(shard, table, row, image, verified=row not in unverified)
        if buffer is not None:
            if copied:
                self._idle_buffers.append(buffer)
            else:
                buffers.append(buffer)

    def _table(self, shard: Shard) -> SampleTable:
        def read() -> SampleTable:
            return read_table(self._url, shard)

        try:
            return patiently(read, self._config.retry_s)
        except ShardError:  # once more: it may have been damaged in transit
            return patiently(read, self._config.retry_s)

    def _read_ranges(
        self,
        shard: Shard,
        table: SampleTable,
        wanted: NDArray[np.int32],
        ranges: list[tuple[int, int]],
        buffer: _Buffer | None,
    ) -> tuple[list[tuple[int, memoryview]], frozenset[int]]:
        """The wanted samples of a shard, read by ranges, and the rows of those that are damaged.

        Raises:
            ShardError: the shard is missing or was replaced.
        """
        parts = [(start, self._fetch(shard, start, stop, buffer)) for start, stop in ranges]
        images = cut_out(parts, table, wanted)
        damaged = damaged_rows(images, table)
        if is_another_shard(examined=len(images), damaged=len(damaged), samples=shard.samples):
            raise ShardError(
                f"{shard_url(self._url, shard)}: {len(damaged)} of {len(images)} samples are not "
                "the packed ones: it was replaced or damaged; restore it or pack the data again"
            )
        return images, damaged

    def _read_whole(self, shard: Shard, table: SampleTable, buffer: _Buffer | None) -> WholeShard:
        url = shard_url(self._url, shard)
        budget_s = self._config.retry_s

        def verified() -> memoryview:
            if self._cache is not None:
                mapped = self._cache.open(
                    url, shard.bytes, shard.sha256, self._fetched, budget_s=budget_s
                )
                return memoryview(mapped)
            into = None if buffer is None else buffer[: shard.bytes].data
            return verified_shard(
                url, shard.bytes, shard.sha256, self._fetched, budget_s=budget_s, into=into
            )

        read = whole_shard(url, shard, table, verified, self._fetched, budget_s=budget_s)
        if read.flaw and url not in self._damage_logged:
            self._damage_logged.add(url)
            logger.warning(
                "event=damaged_shard samples=%d damaged=%d %s",
                shard.samples,
                len(read.damaged),
                read.flaw,
            )
        return read

    def _take_buffer(self, size: int) -> _Buffer:
        """A buffer of at least `size` bytes: an idle one if it is large enough, else a new one."""
        try:
            buffer = self._idle_buffers.pop()
        except IndexError:  # none there: looking first would race with the other threads
            return np.empty(size, np.uint8)
        return buffer if len(buffer) >= size else np.empty(size, np.uint8)

    def _read_single(self, shard_number: int, row: int) -> ReadSample:
        shard = self._shards[shard_number]
        table = self._table(shard)
        image = self._fetch_sample(shard, table, row)
        return self._sample(shard, table, row, image, verified=False)

    def _sample(
        self, shard: Shard, table: SampleTable, row: int, image: memoryview, *, verified: bool
    ) -> ReadSample:
        crc = int(table.crcs[row])
        sound = verified or crc32c(image) == crc
        if not sound:  # once more: it may have been damaged in transit
            image = self._fetch_sample(shard, table, row)
            sound = crc32c(image) == crc
        return ReadSample(
            shard=shard_url(self._url, shard),
            key=table.keys[row],
            image=image,
            suffix=IMAGE_SUFFIXES[table.suffixes[row]],
            label=int(table.labels[row]),
            sound=sound,
        )

    def _fetch_sample(self, shard: Shard, table: SampleTable, row: int) -> memoryview:
        """The bytes of one sample, in memory of their own."""
        start = int(table.offsets[row])
        return self._fetch(shard, start, start + int(table.sizes[row]), None)

    def _fetch(self, shard: Shard, start: int, stop: int, buffer: _Buffer | None) -> memoryview:
        """The bytes [start, stop) of a shard, in a buffer or in new memory."""
        return fetch_part(
            shard_url(self._url, shard),
            start,
            stop,
            self._fetched,
            budget_s=self._config.retry_s,
            into=None if buffer is None else buffer[: stop - start].data,
        )
