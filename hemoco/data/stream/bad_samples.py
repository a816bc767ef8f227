"""Counts of what was read, the list of bad samples, and the limit above which a run stops."""

import json
import logging
from collections.abc import Iterable
from typing import NamedTuple

from hemoco.errors import ShardError
from hemoco.storage.objects import exists, read_bytes, write_bytes

logger = logging.getLogger(__name__)

DAMAGED = "damaged since packed"
BAD_REASONS = ("not an image", "damaged", "too large", "unsupported", DAMAGED)
"""Why samples are replaced: the reasons of `UndecodableImage`, and bytes changed since packing."""
_ALWAYS_ALLOWED = 10
_MAX_LISTED = 10_000


class BadSample(NamedTuple):
    """A sample that was replaced by the next good one of its shard."""

    shard: str
    """URL of the tar."""
    key: str
    reason: str


class ReadCounts(NamedTuple):
    """Counts of what was read since the batch before; reading runs ahead of the batches."""

    samples: int = 0
    bytes: int = 0
    """Fetched from storage."""
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    """Shards that the disk cache had."""
    cache_misses: int = 0
    wait_s: float = 0.0
    """Seconds that the training process waited for the batch."""
    bad: tuple[BadSample, ...] = ()
    """Samples of the batch that were replaced."""

    def since(self, before: "ReadCounts") -> "ReadCounts":
        """Difference from an earlier count, without bad samples."""
        return ReadCounts(
            samples=self.samples - before.samples,
            bytes=self.bytes - before.bytes,
            requests=self.requests - before.requests,
            retries=self.retries - before.retries,
            cache_hits=self.cache_hits - before.cache_hits,
            cache_misses=self.cache_misses - before.cache_misses,
            wait_s=self.wait_s - before.wait_s,
        )


def sum_counts(counts: Iterable[ReadCounts]) -> ReadCounts:
    """The sum of the counts of several processes or batches."""
    parts = list(counts)
    return ReadCounts(
        samples=sum(part.samples for part in parts),
        bytes=sum(part.bytes for part in parts),
        requests=sum(part.requests for part in parts),
        retries=sum(part.retries for part in parts),
        cache_hits=sum(part.cache_hits for part in parts),
        cache_misses=sum(part.cache_misses for part in parts),
        wait_s=sum((part.wait_s for part in parts), 0.0),
        bad=tuple(sample for part in parts for sample in part.bad),
    )


class BadSampleLimit:
    """Stops a run that meets too many bad samples.

    Args:
        max_share: bad samples allowed, as a share of the samples read; ten are always allowed.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._read = 0
        self._bad = 0

    def add(self, counts: ReadCounts) -> None:
        """Adds what was read for a batch.

        Raises:
            ShardError: too many samples were bad; the message names the last one.
        """
        self._read += counts.samples
        self._bad += len(counts.bad)
        if counts.bad and self._bad > max(_ALWAYS_ALLOWED, self._max_share * self._read):
            last = counts.bad[-1]
            raise ShardError(
                f"{self._bad} of {self._read} samples are bad, the last is {last.key} in "
                f"{last.shard}: {last.reason}; repack them, or allow more with stream.max_bad_share"
            )


class BadSampleFile:
    """The bad samples that one process met, each once, as one JSON object per line.

    A run that is resumed continues the list of its file.

    Args:
        url: URL of the file, which is written with the first bad sample.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        lines = read_bytes(url).decode().splitlines() if exists(url) else []
        # a dict used as an ordered set
        self._listed = dict.fromkeys(BadSample(**json.loads(line)) for line in lines)
        self._written = len(self._listed)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Adds bad samples that are not yet listed, up to 10,000 in all."""
        for bad in samples:
            if bad in self._listed or len(self._listed) >= _MAX_LISTED:
                continue
            self._listed[bad] = None
            total = len(self._listed)
            if total.bit_count() == 1:  # logs the 1st, 2nd, 4th, 8th, ...: many would flood the log
                logger.warning("event=bad_sample total=%d shard=%s key=%s reason=%s", total, *bad)

    def write(self) -> None:
        """Writes the list if it has grown."""
        if len(self._listed) > self._written:
            lines = (json.dumps(bad._asdict()) for bad in self._listed)
            write_bytes(self._url, "".join(f"{line}\n" for line in lines).encode())
            self._written = len(self._listed)

    close = write
