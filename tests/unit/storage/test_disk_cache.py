"""The disk cache alone: claims of several processes, and files that are not finished."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from hemoco.storage.disk_cache import DiskCache

KEYS = [f"{number:064x}" for number in range(3)]


def put(cache: DiskCache, key: str, data: bytes) -> None:
    claim = cache.claim(key, len(data))
    assert claim is not None
    with claim, claim.finish(data) as file:
        assert file.read() == data


def get(cache: DiskCache, key: str) -> bytes | None:
    file = cache.find(key)
    if file is None:
        return None
    with file:
        return file.read()


def test_a_file_is_there_once_it_is_finished(tmp_path):
    cache = DiskCache(tmp_path, 100, suffix=".bin")
    with cache.claim(KEYS[0], 3) as claim:
        assert get(cache, KEYS[0]) is None
        claim.finish(b"abc").close()
        assert get(cache, KEYS[0]) == b"abc"
    assert {path.name for path in tmp_path.iterdir()} == {f"{KEYS[0]}.bin", ".lock"}
    assert cache.path(KEYS[0]).stat().st_mode & 0o077 == 0


def test_nobody_claims_a_file_that_is_finished(tmp_path):
    cache = DiskCache(tmp_path, 100)
    put(cache, KEYS[0], b"abc")
    assert cache.claim(KEYS[0], 3) is None
    assert get(cache, KEYS[0]) == b"abc"


def test_an_abandoned_claim_leaves_nothing(tmp_path):
    cache = DiskCache(tmp_path, 100)
    with pytest.raises(ZeroDivisionError), cache.claim(KEYS[0], 3):
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    put(cache, KEYS[0], b"abc")


def test_a_maker_that_was_killed_does_not_stop_the_next(tmp_path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_claim_and_wait, args=(tmp_path, there))
    child.start()
    here.recv()
    assert (tmp_path / f"{KEYS[0]}.partial").stat().st_size == 3
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    put(DiskCache(tmp_path, 5), KEYS[1], b"abcde")
    assert {path.name for path in tmp_path.iterdir()} == {KEYS[1], ".lock"}


def _claim_and_wait(folder: Path, to_parent: Connection) -> None:
    claim = DiskCache(folder, 100).claim(KEYS[0], 3)
    to_parent.send("claimed")
    to_parent.recv()
    assert claim is not None
    claim.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_lock_is_free_although_a_child_was_forked_meanwhile(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    cache = DiskCache(tmp_path, 100)
    with cache.claim(KEYS[0], 3), pytest.raises(Timeout):
        child = context.Process(target=there.recv)
        child.start()
        FileLock(tmp_path / f"{KEYS[0]}.lock", blocking=False).acquire()
    put(cache, KEYS[0], b"abc")  # waits without end if the lock is not free
    here.send("end")
    child.join()
    assert child.exitcode == 0
