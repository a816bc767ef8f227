"""Shards on the disk of a node, shared by its processes and jobs, within a bound on their size.

Files are named by the SHA-256 of their bytes, so shards of the same name in two buckets, or a shard
and its replacement, are never confused.
"""

import hashlib
import logging
import mmap
import os
from pathlib import Path

from hemoco.errors import first_line
from hemoco.storage.disk_cache import Claim, DiskCache
from hemoco.storage.fetch import FetchCounts, verified_shard

logger = logging.getLogger(__name__)


class ShardCache:
    """Verified shards on a local disk; without a usable disk they are read into memory instead.

    Args:
        folder: folder for the files; made when needed, not accessible to other users.
        max_bytes: limit for all files together, including those being written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._disk = DiskCache(folder, max_bytes)
        # Identity of the file whose checksum was verified, by SHA-256: each file is hashed once by
        # each process, and again only if it has been replaced.
        self._verified: dict[str, tuple[int, int]] = {}
        self._warned = False

    def open(
        self, url: str, size: int, sha256: str, counts: FetchCounts, *, budget_s: float
    ) -> mmap.mmap | memoryview:
        """The bytes (size,) of a shard, from the disk or else from the storage.

        If several processes need a shard that is not on the disk, one fetches it and the others
        wait for its file.

        Args:
            url: URL of the shard.
            size: bytes that it had when it was packed.
            sha256: hexadecimal digest of these bytes.
            counts: receives what this takes.
            budget_s: seconds without a new byte after which fetching gives up.

        Raises:
            ShardError: the shard in the storage is missing or is another one.
            StorageError: the storage refuses, or nothing came for `budget_s`.
        """
        entry: mmap.mmap | Claim | None = None
        try:
            # claim() returns None if another process has finished the file while this one waited
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
                return self._store(entry, sha256, data)
            except OSError as error:
                self._warn(url, error)
                return data

    def _find(self, sha256: str, size: int) -> mmap.mmap | None:
        """The bytes of a finished file; None if there is none, or if it was damaged and removed."""
        file = self._disk.find(sha256)
        if file is None:
            return None
        with file:
            stat = os.fstat(file.fileno())
            sound = stat.st_size == size
            if sound and self._verified.get(sha256) != _identity(stat):
                sound = hashlib.file_digest(file, "sha256").hexdigest() == sha256
            if sound:
                self._verified[sha256] = _identity(stat)
                return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        logger.warning("event=damaged_cache_file path=%s", self._disk.path(sha256))
        self._disk.remove(sha256)
        return None

    def _store(self, claim: Claim, sha256: str, data: memoryview) -> mmap.mmap:
        """Writes a claimed file and returns it mapped, so that processes share its memory."""
        with claim.finish(data) as file:
            self._verified[sha256] = _identity(os.fstat(file.fileno()))
            return mmap.mmap(file.fileno(), len(data), prot=mmap.PROT_READ)

    def _warn(self, url: str, error: OSError) -> None:
        """Logs the first time that the disk cannot be used."""
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
