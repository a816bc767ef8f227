"""Files on a local disk, shared by the processes of a machine and never larger than a bound.

A file's name is its key, 64 hexadecimal digits that its content follows from, and a suffix: two contents never meet
under one name. `KEY.partial` is a file in the making. It has its full size from the beginning, so that the bound
holds, and its maker holds the lock `KEY.lock`: without one, it is what a maker that died has left. The lock `.lock` is
held while files are counted, removed or renamed.
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
    """A folder of files; those not used for longest make room for new ones.

    Its methods raise OSError where the disk is full, broken or without locks: whoever uses the cache goes on without.

    Args:
        folder: of the files; made when needed, closed to other users.
        max_bytes: of all files together, those in the making included.
        suffix: of the files' names.
    """

    def __init__(self, folder: Path, max_bytes: int, *, suffix: str = "") -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._suffix = suffix
        # others may keep files in the folder too
        self._ours = re.compile(rf"[0-9a-f]{{64}}({re.escape(suffix)}|{_PARTIAL}|{_LOCK})")

    def path(self, key: str) -> Path:
        """Where the finished file of a key lies."""
        return self.folder / (key + self._suffix)

    def find(self, key: str) -> io.BufferedReader | None:
        """The finished file, opened and marked as used; it stays readable while it is open. None if there is none.

        Raises:
            OSError: the disk cannot serve.
        """
        try:
            file = self.path(key).open("rb")
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # another user's, or read-only: not worth an error
            # the time of change stays: by it a file is recognised
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        return file

    def remove(self, key: str) -> None:
        """Removes a file that was found damaged."""
        self.path(key).unlink(missing_ok=True)

    def claim(self, key: str, size: int) -> "Claim | None":
        """A file of some bytes to be filled; other processes that want it wait until it is closed.

        Returns:
            None if another process has finished it meanwhile.

        Raises:
            OSError: the disk cannot serve.
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

    def _evict(self, room: int, *, beside: str) -> None:
        """Removes what was not used for longest until there is room for so many bytes, those of a key."""
        files: list[tuple[int, int, Path]] = []
        used = room
        for path in self.folder.iterdir():
            key = path.name.partition(".")[0]
            if key == beside or not self._ours.fullmatch(path.name):
                continue
            if path.suffix in (_PARTIAL, _LOCK) and _remove_left_over(self.folder, key):
                continue
            with contextlib.suppress(FileNotFoundError):  # given up or found damaged meanwhile
                stat = path.stat()
                used += stat.st_size
                if path.suffix not in (_PARTIAL, _LOCK):
                    files.append((stat.st_atime_ns, stat.st_size, path))
        for _, size, path in sorted(files):
            if used <= self.max_bytes:
                return
            path.unlink(missing_ok=True)  # who has it open keeps its bytes
            used -= size
        if used > self.max_bytes:
            raise OSError(errno.ENOSPC, f"files in the making fill the {self.max_bytes} bytes")


class Claim:
    """A file in the making, locked. A context manager: left unfinished, the file is removed."""

    def __init__(self, folder: Path, key: str, path: Path) -> None:
        """Waits for the lock of the key."""
        self.partial = folder / (key + _PARTIAL)
        self._path, self._folder = path, folder
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
        """Writes the file and gives it its name in one step; returns it opened.

        Raises:
            OSError: the disk did not take it.
        """
        with self.partial.open("r+b", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            # the kernel's own time of use is coarse, and those of `find` are not
            os.utime(file.fileno(), ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
        finished = self.partial.open("rb")
        with _lock(
            self._folder / _LOCK
        ):  # else who counts the files might see it under neither name
            self.partial.rename(self._path)
        return finished

    def close(self) -> None:
        """Removes the partial file, unless it is finished, and lets others have a try."""
        with contextlib.suppress(
            OSError
        ):  # a disk that broke meanwhile: the next one removes what is left over
            self.partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _remove_locked(self._lock)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _lock(path: Path) -> FileLock:
    # A child forked while the lock is held has its file open, too: filelock unlocks and does not only close
    # (test_a_lock_is_free_although_a_child_was_forked_meanwhile). On a network disk without locks this raises OSError:
    # filelock's substitute would outlive a holder that was killed.
    return FileLock(path, mode=0o600, fallback_to_soft=False, poll_interval=_POLL_S)


def _remove_locked(lock: FileLock) -> None:
    """Removes the file of a lock that is held, then lets go: filelock refuses a lock whose file is gone."""
    try:
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def _remove_left_over(folder: Path, key: str) -> bool:
    """Removes what a maker that died has left of a key; False where the maker lives."""
    lock = _lock(folder / (key + _LOCK))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    (folder / (key + _PARTIAL)).unlink(missing_ok=True)
    _remove_locked(lock)
    return True
