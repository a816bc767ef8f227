"""Files shared by the processes of a machine."""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock of a file, which is made if it is missing."""
    file = open_locked(path)
    try:
        yield
    finally:
        close_unlocked(file)


def open_locked(path: Path) -> io.FileIO:
    """A file, made if it is missing, as soon as no other holds its lock."""
    file = io.FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o600))
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def close_unlocked(file: io.FileIO) -> None:
    """Lets others have the lock of an open file."""
    fcntl.flock(file, fcntl.LOCK_UN)  # closing would not: a child forked meanwhile has it open too
    file.close()
