"""What reading took, counted; which samples were bad, and when there are too many of them."""

import json
import logging
from collections.abc import Iterable
from typing import NamedTuple

from hemoco.errors import ShardError
from hemoco.storage.objects import exists, read_bytes, write_bytes

logger = logging.getLogger(__name__)

DAMAGED = "damaged since packed"
BAD_REASONS = ("not an image", "damaged", "too large", "unsupported", DAMAGED)
"""Why a sample is replaced: those of `UndecodableImage`, and bytes that are not the packed ones."""
_ALWAYS_ALLOWED = 10
_MOST_LISTED = 10_000


class BadSample(NamedTuple):
    """A sample that was replaced by the next good one of its shard."""

    shard: str
    """URL of the tar."""
    key: str
    reason: str


class ReadCounts(NamedTuple):
    """What was read for a batch, or since the batch before: reading runs ahead."""

    samples: int = 0
    bytes: int = 0
    """Fetched from storage."""
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0
    """Shards found in the disk cache."""
    cache_misses: int = 0
    wait_s: float = 0.0
    """That the training process waited for it."""
    bad: tuple[BadSample, ...] = ()
    """Replaced samples, those of the batch."""

    def since(self, before: "ReadCounts") -> "ReadCounts":
        """The growth since an earlier count, without bad samples."""
        numbers = (now - then for now, then in zip(self[:-1], before[:-1], strict=True))
        return ReadCounts._make([*numbers, ()])


def sum_counts(counts: Iterable[ReadCounts]) -> ReadCounts:
    """The counts of several processes or batches together."""
    parts = [ReadCounts(), *counts]
    numbers = (sum(column) for column in zip(*(part[:-1] for part in parts), strict=True))
    return ReadCounts._make([*numbers, tuple(bad for part in parts for bad in part.bad)])


class BadSampleLimit:
    """Stops a run whose data is not what it should be.

    Args:
        max_share: bad samples allowed as a share of those read; the first ten are always allowed.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._read = 0
        self._bad = 0

    def add(self, counts: ReadCounts) -> None:
        """Takes what was read for a batch.

        Raises:
            ShardError: too many samples were bad; names the last.
        """
        self._read += counts.samples
        self._bad += len(counts.bad)
        if counts.bad and self._bad > max(_ALWAYS_ALLOWED, self._max_share * self._read):
            last = counts.bad[-1]
            raise ShardError(
                f"{self._bad} of {self._read} samples are bad, the last is {last.key} in {last.shard}: {last.reason}; "
                "repack them, or allow more with stream.max_bad_share"
            )


class BadSampleFile:
    """The bad samples that one process met, one JSON object per line; an interrupted run goes on with its list.

    Args:
        url: of the file, which appears with the first bad sample.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        lines = read_bytes(url).decode().splitlines() if exists(url) else []
        self._listed = dict.fromkeys(BadSample(**json.loads(line)) for line in lines)
        self._written = len(self._listed)

    def add(self, found: Iterable[BadSample]) -> None:
        """Takes bad samples, each once; 10,000 say enough about what is wrong."""
        for bad in found:
            if bad not in self._listed and len(self._listed) < _MOST_LISTED:
                self._listed[bad] = None
                if len(self._listed).bit_count() == 1:  # the 1st, 2nd, 4th, ...
                    logger.warning(
                        "event=bad_sample total=%d shard=%s key=%s reason=%s",
                        len(self._listed),
                        *bad,
                    )

    def write(self) -> None:
        """Writes the list if it has grown."""
        if len(self._listed) > self._written:
            lines = (json.dumps(bad._asdict()) for bad in self._listed)
            write_bytes(self._url, "".join(f"{line}\n" for line in lines).encode())
            self._written = len(self._listed)

    close = write
