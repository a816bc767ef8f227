"""Shards on the disk of a node, shared by its processes and jobs and never larger than a bound.

A file's name is the SHA-256 of its bytes: equal names in two buckets, or a shard and its replacement, cannot meet.
`NAME.partial` is a file in the making. It has its full size from the beginning, so that the bound holds, and its maker
holds its lock, so that one without a lock is what a maker that died has left.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import mmap
import os
import re
import time
from pathlib import Path

from hemoco.errors import first_line
from hemoco.storage.disk_cache import close_unlocked, file_lock, open_locked
from hemoco.storage.fetch import FetchCounts, verified_shard

logger = logging.getLogger(__name__)

_OURS = re.compile(r"[0-9a-f]{64}(\.partial)?")
_PARTIAL, _LOCK = ".partial", ".lock"


class ShardCache:
    """Verified shards on a local disk; what the disk cannot serve comes through memory.

    Args:
        folder: of the files; made when needed, closed to other users.
        max_bytes: of all files together, those in the making included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        # by name, inode and time of change of the file whose checksum holds
        self._proved: dict[str, tuple[int, int]] = {}
        self._warned = False

    def open(self, url: str, size: int, sha256: str, counts: FetchCounts, *, budget_s: float) -> mmap.mmap | memoryview:
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
        try:
            entry = self._find_or_claim(sha256, size)
        except OSError as error:
            self._warn(url, error)
            entry = None
        counts.add_cached(isinstance(entry, mmap.mmap))
        if isinstance(entry, mmap.mmap):
            return entry
        try:
            data = verified_shard(url, size, sha256, counts, budget_s=budget_s)
            return data if entry is None else self._keep(url, sha256, entry, data)
        finally:
            if entry is not None:
                _let_go(entry)

    def _find_or_claim(self, sha256: str, size: int) -> mmap.mmap | io.FileIO:
        """The file's bytes, or a locked partial file to be filled.

        Raises:
            OSError: the disk cannot serve.
        """
        if size > self._max_bytes:
            raise OSError(errno.EFBIG, f"a shard of {size} bytes does not fit into {self._max_bytes}")
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._folder.stat().st_mode & 0o077:
            self._folder.chmod(0o700)
        while (entry := self._find(sha256, size) or self._claim(sha256, size)) is None:
            pass
        return entry

    def _claim(self, sha256: str, size: int) -> io.FileIO | None:
        """The locked partial file; None if another finished it or gave it up, while this one waited for the lock."""
        partial = open_locked(self._folder / (sha256 + _PARTIAL))
        try:
            if not _is_in_place(partial) or (self._folder / sha256).exists():
                _let_go(partial)
                return None
            self._reserve(partial, size)
        except OSError:
            _let_go(partial)
            raise
        return partial

    def _find(self, sha256: str, size: int) -> mmap.mmap | None:
        """The bytes of a finished file, if it is what it should be."""
        path = self._folder / sha256
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            stat = os.fstat(file.fileno())
            if stat.st_size == size and (self._proved.get(sha256) == _identity(stat) or _digest(file) == sha256):
                self._proved[sha256] = _identity(stat)
                with contextlib.suppress(OSError):  # another user's, or read-only: not worth an error
                    os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
                return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        logger.warning("event=damaged_cache_file path=%s", path)
        path.unlink(missing_ok=True)
        return None

    def _reserve(self, partial: io.FileIO, size: int) -> None:
        """Gives a partial file its size, after removing what was not used for longest."""
        with file_lock(self._folder / _LOCK):
            partial.truncate(0)  # what a maker that died has left
            self._evict(size)
            os.posix_fallocate(partial.fileno(), 0, size)

    def _evict(self, room: int) -> None:
        """Removes what was not used for longest until there is room for so many bytes."""
        files: list[tuple[int, int, Path]] = []
        used = room
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # given up or found damaged meanwhile
                if _OURS.fullmatch(path.name) and not _is_left_over(path):
                    stat = path.stat()
                    used += stat.st_size
                    if path.suffix != _PARTIAL:
                        files.append((stat.st_atime_ns, stat.st_size, path))
        for _, size, path in sorted(files):
            if used <= self._max_bytes:
                return
            path.unlink(missing_ok=True)  # who has it open keeps its bytes
            used -= size
        if used > self._max_bytes:
            raise OSError(errno.ENOSPC, f"shards in the making fill the {self._max_bytes} bytes")

    def _keep(self, url: str, sha256: str, partial: io.FileIO, data: memoryview) -> mmap.mmap | memoryview:
        """Makes a partial file the finished one; its bytes, which others share."""
        try:
            left = data
            while left:
                left = left[partial.write(left) :]
            kept = mmap.mmap(partial.fileno(), len(data), prot=mmap.PROT_READ)
            with file_lock(self._folder / _LOCK):  # else who counts the files might see it under neither name
                # the kernel's own time of use is coarse, and those of `_find` are not
                os.utime(partial.fileno(), ns=(time.time_ns(), os.fstat(partial.fileno()).st_mtime_ns))
                (self._folder / (sha256 + _PARTIAL)).rename(self._folder / sha256)
        except OSError as error:
            self._warn(url, error)
            return data
        self._proved[sha256] = _identity(os.fstat(partial.fileno()))
        return kept

    def _warn(self, url: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = first_line(error)
            logger.warning("event=shard_not_cached folder=%s first_url=%s reason=%s", self._folder, url, reason)


def _let_go(partial: io.FileIO) -> None:
    """Removes a partial file, unless it has been finished, and lets others have a try."""
    if _is_in_place(partial):
        Path(partial.name).unlink()
    close_unlocked(partial)


def _is_in_place(file: io.FileIO) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False


def _is_left_over(path: Path) -> bool:
    """Removes a partial file whose maker has died."""
    if path.suffix != _PARTIAL:
        return False
    file = io.FileIO(path, "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _let_go(file)
    return True


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


def _digest(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()
