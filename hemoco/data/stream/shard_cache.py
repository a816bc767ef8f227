"""Shards on the disk of a node, shared by its processes and jobs and never larger than a bound.

A file's name is the SHA-256 of its bytes: equal names in two buckets, or a shard and its replacement, cannot meet.
"""

import hashlib
import io
import logging
import mmap
import os
from pathlib import Path

from hemoco.errors import first_line
from hemoco.storage.disk_cache import Claim, DiskCache
from hemoco.storage.fetch import FetchCounts, verified_shard

logger = logging.getLogger(__name__)


class ShardCache:
    """Verified shards on a local disk; what the disk cannot serve comes through memory.

    Args:
        folder: of the files; made when needed, closed to other users.
        max_bytes: of all files together, those in the making included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._disk = DiskCache(folder, max_bytes)
        # by name, inode and time of change of the file whose checksum holds
        self._proved: dict[str, tuple[int, int]] = {}
        self._warned = False

    def open(
        self, url: str, size: int, sha256: str, counts: FetchCounts, *, budget_s: float
    ) -> mmap.mmap | memoryview:
        """The bytes (size,) of a shard; of those that want one that is not here, one process fetches and others wait.

        Args:
            url: of the shard.
            size: bytes that it had when it was packed.
            sha256: of these, hexadecimal.
            counts: what this takes is added to it.
            budget_s: seconds without a new byte after which fetching gives up.

        Raises:
            ShardError: the shard in the storage is missing or another.
            StorageError: the storage refuses, or nothing came for `budget_s`.
        """
        entry: mmap.mmap | Claim | None = None
        try:
            while entry is None:
                entry = self._find(sha256, size) or self._disk.claim(sha256, size)
        except OSError as error:
            self._warn(url, error)
        counts.add_cached(isinstance(entry, mmap.mmap))
        if isinstance(entry, mmap.mmap):
            return entry
        if entry is None:
            return verified_shard(url, size, sha256, counts, budget_s=budget_s)
        with entry:
            data = verified_shard(url, size, sha256, counts, budget_s=budget_s)
            try:
                return self._keep(entry, sha256, data)
            except OSError as error:
                self._warn(url, error)
                return data

    def _find(self, sha256: str, size: int) -> mmap.mmap | None:
        """The bytes of a finished file, if it is what it should be."""
        file = self._disk.find(sha256)
        if file is None:
            return None
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_size == size and (
                self._proved.get(sha256) == _identity(stat) or _digest(file) == sha256
            ):
                self._proved[sha256] = _identity(stat)
                return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        logger.warning("event=damaged_cache_file path=%s", self._disk.path(sha256))
        self._disk.remove(sha256)
        return None

    def _keep(self, claim: Claim, sha256: str, data: memoryview) -> mmap.mmap:
        """Makes a claimed file the finished one; its bytes, which others share."""
        with claim.finish(data) as file:
            self._proved[sha256] = _identity(os.fstat(file.fileno()))
            return mmap.mmap(file.fileno(), len(data), prot=mmap.PROT_READ)

    def _warn(self, url: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "event=shard_not_cached folder=%s first_url=%s reason=%s",
                self._disk.folder,
                url,
                first_line(error),
            )


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


def _digest(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
