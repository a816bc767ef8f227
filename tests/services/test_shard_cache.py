"""The shard cache on real disks: one fetch for all readers, a bounded size, correct bytes."""

import contextlib
import hashlib
import logging
import multiprocessing
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from filelock import FileLock

from hemoco.data.stream.shard_cache import ShardCache
from hemoco.errors import ShardError, StorageError
from hemoco.storage.fetch import FetchCounts
from hemoco.storage.objects import read_bytes, remove, write_bytes
from tests.helpers.fault_proxy import fault_proxy

SIZE = 50_000
SHARDS = [random.Random(seed).randbytes(SIZE) for seed in range(5)]
NAMES = [hashlib.sha256(data).hexdigest() for data in SHARDS]


@pytest.fixture
def source(tmp_path: Path) -> str:
    """URL of a folder of shards, 0.tar to 4.tar."""
    url = (tmp_path / "source").as_uri()
    for number, data in enumerate(SHARDS):
        write_bytes(f"{url}/{number}.tar", data)
    return url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node" / "shards"


def read(cache: ShardCache, source: str, number: int, counts: FetchCounts | None = None) -> bytes:
    counts = FetchCounts() if counts is None else counts
    return bytes(cache.open(f"{source}/{number}.tar", SIZE, NAMES[number], counts, budget_s=5))


def kept(folder: Path) -> set[int]:
    """Returns the numbers of the shards on disk."""
    return {NAMES.index(path.name) for path in folder.iterdir() if path.name in NAMES}


def test_a_shard_is_fetched_once_and_then_read_from_disk(source, folder):
    counts = FetchCounts()
    cache = ShardCache(folder, 2 * SIZE)
    assert [read(cache, source, 0, counts) for _ in range(3)] == 3 * [SHARDS[0]]
    assert (counts.requests, counts.bytes, counts.cache_misses, counts.cache_hits) == (
        1,
        SIZE,
        1,
        2,
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in folder.iterdir()} == {NAMES[0], ".lock"}


def test_the_next_job_needs_no_request(source, folder):
    read(ShardCache(folder, SIZE), source, 0)
    remove(source)
    counts = FetchCounts()
    assert read(ShardCache(folder, SIZE), source, 0, counts) == SHARDS[0]
    assert (counts.requests, counts.cache_hits) == (0, 1)


def test_equal_names_of_two_sources_do_not_meet(source, folder, tmp_path):
    other = (tmp_path / "other").as_uri()
    write_bytes(f"{other}/0.tar", SHARDS[1])
    cache = ShardCache(folder, 2 * SIZE)
    assert read(cache, source, 0) == SHARDS[0]
    assert (
        bytes(cache.open(f"{other}/0.tar", SIZE, NAMES[1], FetchCounts(), budget_s=5)) == SHARDS[1]
    )


def test_the_least_recently_used_goes_first_and_what_is_open_stays_readable(source, folder):
    cache = ShardCache(folder, 3 * SIZE)
    opened = [
        cache.open(f"{source}/{n}.tar", SIZE, NAMES[n], FetchCounts(), budget_s=5) for n in range(3)
    ]
    read(cache, source, 0)
    for number, left in [(3, {0, 2, 3}), (4, {0, 3, 4}), (1, {3, 4, 1})]:
        assert read(cache, source, number) == SHARDS[number]
        assert kept(folder) == left
    assert [bytes(data) for data in opened] == SHARDS[:3]


def test_the_files_never_exceed_the_bound(source, folder):
    read(ShardCache(folder, 3 * SIZE), source, 0)
    orders = [random.Random(seed).choices(range(5), k=60) for seed in range(4)]
    most = 0
    with ThreadPoolExecutor(4) as pool:
        caches = [ShardCache(folder, 3 * SIZE) for _ in orders]
        tasks = [
            pool.submit(lambda c, o: [read(c, source, n) for n in o], *pair)
            for pair in zip(caches, orders, strict=True)
        ]
        while wait(tasks, timeout=0.005).not_done:
            with FileLock(folder / ".lock"):  # so that no file changes its name or grows meanwhile
                most = max(most, used(folder))
        assert [task.result() for task in tasks] == [
            [SHARDS[number] for number in order] for order in orders
        ]
    assert 0 < most <= 3 * SIZE
    assert {path.name for path in folder.iterdir()} <= {*NAMES, ".lock"}


def used(folder: Path) -> int:
    """Returns the bytes of all files; files may be removed meanwhile."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_of_several_processes_one_fetches_and_the_others_wait(s3, bucket, folder, monkeypatch):
    write_bytes(f"{bucket}/0.tar", SHARDS[0])
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.fail("trickle", after=SIZE // 4, seconds=0.3)
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            results = pool.starmap(_open_in_child, 4 * [(str(folder), bucket)], chunksize=1)
        assert len(proxy.requests) == 1
    assert {found for found, _, _ in results} == {NAMES[0]}
    assert (sum(hits for _, hits, _ in results), sum(misses for _, _, misses in results)) == (3, 1)


def _open_in_child(folder: str, source: str) -> tuple[str, int, int]:
    counts = FetchCounts()
    data = read(ShardCache(Path(folder), SIZE), source, 0, counts)
    return hashlib.sha256(data).hexdigest(), counts.cache_hits, counts.cache_misses


def test_when_the_one_that_fetches_fails_the_next_tries(source, folder):
    moved = read_bytes(f"{source}/0.tar")
    remove(f"{source}/0.tar")
    cache = ShardCache(folder, SIZE)
    with pytest.raises(ShardError, match="a shard is missing"):
        read(cache, source, 0)
    assert not list(folder.glob("*.partial"))
    write_bytes(f"{source}/0.tar", moved)
    assert read(cache, source, 0) == SHARDS[0]


def test_a_replaced_shard_is_refused_and_not_kept(source, folder):
    write_bytes(f"{source}/0.tar", SHARDS[1])
    with pytest.raises(ShardError, match="SHA-256"):
        read(ShardCache(folder, SIZE), source, 0)
    assert kept(folder) == set()


def test_a_shard_replaced_in_storage_while_cached_is_still_the_packed_one(source, folder):
    cache = ShardCache(folder, SIZE)
    read(cache, source, 0)
    write_bytes(f"{source}/0.tar", SHARDS[1])
    assert read(cache, source, 0) == SHARDS[0]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_damaged_file_is_never_served_but_fetched_again(
    source, folder, damage, same_process, caplog
):
    cache = ShardCache(folder, SIZE)
    read(cache, source, 0)
    damaged = {"cut": SHARDS[0][:-512], "flip": b"\0" + SHARDS[0][1:], "empty": b""}[damage]
    (folder / NAMES[0]).write_bytes(damaged)
    counts = FetchCounts()
    assert read(cache if same_process else ShardCache(folder, SIZE), source, 0, counts) == SHARDS[0]
    assert (counts.requests, counts.cache_misses) == (1, 1)
    assert "event=damaged_cache_file" in caplog.text
    assert (folder / NAMES[0]).read_bytes() == SHARDS[0]


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_killed_process_left_is_removed(source, folder, number):
    folder.mkdir(parents=True)
    (folder / f"{NAMES[1]}.partial").write_bytes(bytes(SIZE))
    (folder / f"{NAMES[1]}.lock").touch()
    (folder / f"{NAMES[2]}.lock").touch()
    (folder / "notes.txt").write_text("not ours")
    assert read(ShardCache(folder, SIZE), source, number) == SHARDS[number]
    assert {path.name for path in folder.iterdir()} == {NAMES[number], ".lock", "notes.txt"}


def test_what_a_living_process_makes_counts_and_is_left_alone(source, folder, caplog):
    folder.mkdir(parents=True)
    partial = folder / f"{NAMES[1]}.partial"
    with FileLock(folder / f"{NAMES[1]}.lock"), partial.open("wb") as file:
        file.truncate(SIZE)
        assert read(ShardCache(folder, 2 * SIZE - 1), source, 0) == SHARDS[0]
        assert kept(folder) == set()
        assert read(ShardCache(folder, 2 * SIZE), source, 0) == SHARDS[0]
        assert kept(folder) == {0}
        assert partial.stat().st_size == SIZE
    assert "files being written fill" in caplog.text


def streams(cache: ShardCache, source: str, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """Asserts that shards are read although the cache fails, with one warning."""
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


def test_a_shard_larger_than_the_bound_comes_through_memory(source, folder, caplog):
    streams(
        ShardCache(folder, SIZE - 1), source, caplog, f"{SIZE} bytes do not fit into {SIZE - 1}"
    )


def test_a_folder_that_cannot_be_made_is_no_obstacle(source, folder, caplog):
    folder.parent.write_text("a file in its place")
    streams(ShardCache(folder, 9 * SIZE), source, caplog, "Not a directory")


def test_a_file_that_cannot_grow_is_no_obstacle(source, folder, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, hard))
    try:
        streams(ShardCache(folder, 9 * SIZE), source, caplog, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in folder.iterdir()} == {".lock"}


def test_an_unreachable_storage_is_an_error_although_there_is_a_cache(s3, folder, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="can be reached"):
        ShardCache(folder, SIZE).open(
            "s3://hemoco/0.tar", SIZE, NAMES[0], FetchCounts(), budget_s=0.1
        )
    assert not list(folder.glob("*.partial"))
