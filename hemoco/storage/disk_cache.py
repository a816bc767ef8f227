"""Files on a local disk, shared by the processes of a machine, within a bound on their size.

A file is named by its key and a suffix. The key is 64 hexadecimal digits that determine the
content, so two contents never share a name.

- `KEY.partial` is a file that is being written. It has its full size from the beginning, so that
  the bound holds at any time.
- `KEY.lock` is held by the process that writes the file. A partial file whose lock is free was left
  by a process that died.
- `.lock` is held while files are counted, removed or renamed.
"""

import contextlib
import errno
import io
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

_PARTIAL, _LOCK = ".partial", ".lock"
_POLL_S = 0.01


class DiskCache:
    """A folder of files; the least recently used are removed for new ones.

    Methods raise OSError if the disk is full, broken or without locks. Callers then work without
    the cache.

    Args:
        folder: folder for the files; made when needed, not accessible to other users.
        max_bytes: limit for all files together, including those being written.
        suffix: end of the files' names.
    """

    def __init__(self, folder: Path, max_bytes: int, *, suffix: str = "") -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._suffix = suffix
        # the folder may contain files that are not of this cache
        self._own = re.compile(rf"[0-9a-f]{{64}}({re.escape(suffix)}|{_PARTIAL}|{_LOCK})")

    def path(self, key: str) -> Path:
        """Path of the finished file of a key."""
        return self.folder / (key + self._suffix)

    def find(self, key: str) -> io.BufferedReader | None:
        """Opens the finished file of a key and marks it as used.

        Returns:
            The file, readable while it is open even if it is removed; None if there is none.

        Raises:
            OSError: the disk cannot be read.
        """
        try:
            file = self.path(key).open("rb")
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # a read-only disk, or another user's file
            # Sets the access time, by which files are evicted. The modification time is kept: it
            # identifies a file that was verified before.
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        return file

    def remove(self, key: str) -> None:
        """Removes the finished file of a key, if there is one."""
        self.path(key).unlink(missing_ok=True)

    def claim(self, key: str, size: int) -> "Claim | None":
        """Reserves space for a file of `size` bytes; other processes that claim it wait.

        Returns:
            The claim, to be finished and closed; None if another process finished the file while
            this one waited.

        Raises:
            OSError: the file does not fit, or the disk cannot be written.
        """
        if size > self.max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes do not fit into {self.max_bytes}")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_mode & 0o077:
            self.folder.chmod(0o700)
        claim = Claim(self.folder, key, self.path(key))
        try:
            if self.path(key).exists():
                claim.close()
                return None
            with (
                _lock(self.folder / _LOCK),
                open(claim.partial, "wb", opener=_open_private) as file,
            ):
                self._evict(size, beside=key)
                os.posix_fallocate(file.fileno(), 0, size)
        except BaseException:
            claim.close()
            raise
        return claim

    def _evict(self, needed: int, *, beside: str) -> None:
        """Removes the least recently used files until `needed` more bytes fit.

        Args:
            needed: bytes.
            beside: key of the file to be written, whose own files are left alone.

        Raises:
            OSError: the files that are being written leave too little.
        """
        finished: list[tuple[int, int, Path]] = []
        used = needed
        for path in self.folder.iterdir():
            key = path.name.partition(".")[0]
            if key == beside or not self._own.fullmatch(path.name):
                continue
            being_written = path.suffix in (_PARTIAL, _LOCK)
            if being_written and _remove_left_over(self.folder, key):
                continue
            # another process may have removed the file by now
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                used += stat.st_size
                if not being_written:
                    finished.append((stat.st_atime_ns, stat.st_size, path))
        for _, size, path in sorted(finished):
            if used <= self.max_bytes:
                return
            path.unlink(missing_ok=True)  # processes that have it open keep its bytes
            used -= size
        if used > self.max_bytes:
            raise OSError(errno.ENOSPC, f"files being written fill the {self.max_bytes} bytes")


class Claim:
    """A locked file that is being written, as a context manager; unless finished, it is removed.

    Creating a claim waits for the lock of the key.
    """

    def __init__(self, folder: Path, key: str, path: Path) -> None:
        self.partial = folder / (key + _PARTIAL)
        self._path = path
        self._folder = folder
        self._lock = _lock(folder / (key + _LOCK))
        self._lock.acquire()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def finish(self, data: bytes | memoryview) -> io.BufferedReader:
        """Writes the file, gives it its name atomically, and opens it.

        Raises:
            OSError: the disk cannot be written.
        """
        with self.partial.open("r+b", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            # the kernel's timestamps are coarser than those that `find` sets, so files finished
            # and used within one tick would be evicted in the wrong order
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        finished = self.partial.open("rb")
        # a process that counts the files might otherwise see this one under neither name
        with _lock(self._folder / _LOCK):
            self.partial.rename(self._path)
        return finished

    def close(self) -> None:
        """Removes the partial file, if it is not finished, and releases the lock."""
        # if the disk fails now, the next process that evicts removes what is left
        with contextlib.suppress(OSError):
            self.partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _remove_locked(self._lock)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock(path: Path) -> FileLock:
    # A child forked while the lock is held has the lock's file open, too. filelock unlocks the file
    # and does not only close it, so the lock becomes free although the child lives
    # (test_a_lock_is_free_although_a_child_was_forked_meanwhile).
    # On a network disk without locks, this raises OSError. filelock's substitute (the existence of
    # a file) would outlive a holder that was killed.
    return FileLock(path, mode=0o600, fallback_to_soft=False, poll_interval=_POLL_S)


def _remove_locked(lock: FileLock) -> None:
    """Removes the file of a held lock, then releases the lock.

    A process that waited gets the lock of the removed file. filelock notices that the file is gone,
    and locks a new one.
    """
    try:
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def _remove_left_over(folder: Path, key: str) -> bool:
    """Removes what a process that died has left of a key; returns False if its writer is alive."""
    lock = _lock(folder / (key + _LOCK))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    (folder / (key + _PARTIAL)).unlink(missing_ok=True)
    _remove_locked(lock)
    return True
