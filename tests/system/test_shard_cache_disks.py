"""The shard cache on a disk that is full or read-only."""

import hashlib
import logging
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hemoco.data.stream.shard_cache import ShardCache
from hemoco.storage.fetch import FetchCounts
from hemoco.storage.objects import write_bytes

SIZE = 50_000
SHARDS = [random.Random(seed).randbytes(SIZE) for seed in range(3)]
NAMES = [hashlib.sha256(data).hexdigest() for data in SHARDS]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """The URL of a folder of shards, 0.tar to 2.tar."""
    url = (tmp_path / "source").as_uri()
    for number, data in enumerate(SHARDS):
        write_bytes(f"{url}/{number}.tar", data)
    return url


def read(cache: ShardCache, source: str, number: int, counts: FetchCounts) -> bytes:
    return bytes(cache.open(f"{source}/{number}.tar", SIZE, NAMES[number], counts, budget_s=5))


def streams(cache: ShardCache, source: str, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """Asserts that shards arrive although the cache fails, and that one warning has the reason."""
    caplog.set_level(logging.WARNING)
    counts = FetchCounts()
    assert [read(cache, source, number, counts) for number in (0, 1, 0)] == [
        SHARDS[0],
        SHARDS[1],
        SHARDS[0],
    ]
    assert (counts.requests, counts.cache_misses, counts.cache_hits) == (3, 3, 0)
    assert caplog.text.count("event=shard_not_cached") == 1
    assert reason in caplog.text


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one shard."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE * 3 // 2}", "tmpfs", disk], check=True
    )
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_no_obstacle(source, tiny_disk, caplog):
    (tiny_disk / "other").write_bytes(bytes(SIZE))
    streams(ShardCache(tiny_disk / "shards", 9 * SIZE), source, caplog, "No space left on device")
    assert not list((tiny_disk / "shards").glob("*.partial"))


def test_a_read_only_disk_serves_what_it_has_and_is_no_obstacle(source, tiny_disk, caplog):
    read(ShardCache(tiny_disk / "shards", SIZE), source, 2, FetchCounts())
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    cache = ShardCache(tiny_disk / "shards", 9 * SIZE)
    counts = FetchCounts()
    assert read(cache, source, 2, counts) == SHARDS[2]
    assert counts.cache_hits == 1
    streams(cache, source, caplog, "Read-only file system")
