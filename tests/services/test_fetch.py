"""Fetching from real servers with real faults: the bytes are correct, or the error is clear."""

import hashlib
import multiprocessing
import os
import random
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from hemoco.errors import ShardError, StorageError
from hemoco.storage import fetch, http_range
from hemoco.storage.fetch import FetchCounts, fetch_range, verified_shard
from hemoco.storage.objects import tls_context, write_bytes
from hemoco.storage.retry import STORAGE_RETRIES
from tests.helpers.fault_proxy import FaultProxy, fault_proxy

DATA = random.Random(0).randbytes(1_000_000)
SIZE = len(DATA)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fetch, "STORAGE_RETRIES", replace(STORAGE_RETRIES, first_wait_s=0.001, longest_wait_s=0.01)
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_SILENCE_S", 0.5)


@pytest.fixture(scope="module")
def running_proxy(s3: str) -> Iterator[FaultProxy]:
    with (
        fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def proxy(running_proxy: FaultProxy) -> FaultProxy:
    """A proxy in front of the S3 server, without faults and without requests so far."""
    running_proxy.heal()
    running_proxy.requests.clear()
    return running_proxy


@pytest.fixture
def shard(proxy: FaultProxy, bucket: str) -> str:
    """URL of an object with DATA behind the proxy."""
    write_bytes(f"{bucket}/a shard+ö.tar", DATA)
    proxy.requests.clear()
    return f"{bucket}/a shard+ö.tar"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[ThreadingHTTPServer, Path]]:
    """A web server without range requests, and its folder."""
    handler = type(
        "Quiet",
        (SimpleHTTPRequestHandler,),
        {"log_message": lambda *_: None, "protocol_version": "HTTP/1.1"},
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        server.handle_error = lambda *_: None  # clients hang up on purpose
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server, tmp_path
        server.shutdown()
        thread.join()


@pytest.fixture(params=["s3", "file", "memory", "http"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an object with DATA."""
    if request.param == "s3":
        return str(request.getfixturevalue("shard"))
    if request.param == "http":
        server, folder = request.getfixturevalue("web")
        (folder / "s.tar").write_bytes(DATA)
        return f"http://127.0.0.1:{server.server_port}/s.tar"
    url = (
        f"memory://{uuid.uuid4().hex}/s.tar"
        if request.param == "memory"
        else (tmp_path / "s.tar").as_uri()
    )
    write_bytes(url, DATA)
    return url


def starts(proxy: FaultProxy) -> list[int | None]:
    return [request.start for request in proxy.requests]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, SIZE), (0, 1), (SIZE - 1, SIZE), (5, 700_001), (3, 3)]
)
def test_a_range_is_that_of_the_object(anywhere, start, stop):
    counts = FetchCounts()
    for _ in range(2):  # the second on a connection that was used
        assert fetch_range(anywhere, start, stop, counts) == DATA[start:stop]
    assert (counts.bytes, counts.retries) == (2 * (stop - start), 0)


@pytest.mark.parametrize(("start", "stop"), [(0, SIZE + 1), (SIZE, SIZE + 5), (SIZE + 5, SIZE + 9)])
def test_a_range_beyond_the_end_says_how_long_the_object_is(anywhere, start, stop):
    with pytest.raises(
        StorageError, match=f"it has {SIZE} bytes, bytes {start} to {stop} were asked for"
    ):
        fetch_range(anywhere, start, stop, FetchCounts())


@pytest.mark.parametrize("status", [503, 500, 429, 408])
def test_a_burst_of_refusals_costs_only_retries(shard, proxy, status):
    proxy.fail("status", times=3, status=status)
    counts = FetchCounts()
    assert fetch_range(shard, 0, SIZE, counts) == DATA
    assert (counts.requests, counts.retries, counts.bytes) == (4, 3, SIZE)


def test_after_a_truncation_it_goes_on_at_the_byte_where_it_broke(shard, proxy):
    proxy.fail("truncate", after=300_001)
    proxy.fail("truncate", after=5)
    counts = FetchCounts()
    assert fetch_range(shard, 100, SIZE, counts) == DATA[100:]
    assert starts(proxy) == [100, 300_101, 300_106]
    assert counts.bytes == SIZE - 100


def test_after_a_reset_it_goes_on_at_the_byte_where_it_broke(shard, proxy):
    proxy.fail("reset", after=300_000)
    counts = FetchCounts()
    assert fetch_range(shard, 0, SIZE, counts) == DATA
    first, second = starts(proxy)
    assert first == 0 <= second <= 300_000  # a reset may take with it what was not read
    assert counts.bytes == SIZE


def test_after_a_stall_it_asks_again_for_the_rest(shard, proxy, impatient):
    proxy.fail("stall", after=300_000, seconds=5)
    began = time.monotonic()
    assert fetch_range(shard, 0, SIZE, FetchCounts()) == DATA
    assert starts(proxy) == [0, 300_000]
    assert time.monotonic() - began < 4


def test_the_budget_begins_anew_with_every_byte_that_comes(shard, proxy, monkeypatch):
    monkeypatch.setattr(fetch, "_SILENCE_S", 0.1)
    proxy.fail("stall", after=SIZE // 10, seconds=5, times=6)
    counts = FetchCounts()
    assert fetch_range(shard, 0, SIZE, counts, budget_s=0.3) == DATA
    assert counts.seconds > 0.6


def test_a_slow_answer_is_not_a_fault(shard, proxy, impatient):
    proxy.fail("trickle", after=SIZE // 4, seconds=0.2)
    counts = FetchCounts()
    assert fetch_range(shard, 0, SIZE, counts) == DATA
    assert counts.retries == 0
    assert counts.seconds > fetch._SILENCE_S


def test_an_answer_to_another_range_is_not_taken(shard, proxy):
    proxy.fail("content_range")
    counts = FetchCounts()
    assert fetch_range(shard, 0, SIZE - 1, counts) == DATA[:-1]
    assert (counts.retries, counts.bytes) == (1, SIZE - 1)


def test_any_sequence_of_faults_leaves_the_bytes_as_they_are(shard, proxy):
    draw = random.Random(1)
    for _ in range(25):
        kind = draw.choice(["status", "reset", "truncate", "content_range"])
        proxy.fail(kind, after=draw.choice([0, 1, 1000, 65_536, 90_000]))
    assert verified_shard(shard, SIZE, SHA256, FetchCounts()) == DATA
    assert len(proxy.requests) == 26


def test_what_the_plain_client_cannot_deal_with_the_library_gets(shard, proxy):
    proxy.fail("status", status=400)
    counts = FetchCounts()
    assert fetch_range(shard, 7, SIZE, counts) == DATA[7:]
    assert (counts.requests, counts.retries) == (2, 0)


def test_faults_that_the_library_meets_cost_only_retries(shard, proxy, monkeypatch):
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # else it hides them
    monkeypatch.setattr(fetch, "_PART_BYTES", 400_000)
    proxy.fail("status", status=400)
    proxy.fail("truncate", after=10)
    counts = FetchCounts()
    assert verified_shard(shard, SIZE, SHA256, counts) == DATA
    assert (counts.requests, counts.retries, counts.bytes) == (5, 1, SIZE)


def test_a_spent_budget_says_what_came_and_what_to_do(shard, proxy, caplog):
    proxy.fail("truncate", after=10)
    proxy.fail("status", times=float("inf"))
    began = time.monotonic()
    with pytest.raises(StorageError) as raised:
        fetch_range(shard, 0, SIZE, FetchCounts(), budget_s=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    message = str(raised.value)
    assert message.startswith(f"{shard}: 10 of {SIZE} bytes came in ")
    assert (
        "nothing new for 0.3 s, at last: answered 503 Service Unavailable; check that http://127"
        in message
    )
    assert message.endswith("run the same command again: it resumes")
    assert f"event=fetch_fault url={shard} byte=10" in caplog.text
    assert "X-Amz" not in message + caplog.text


def test_a_stall_longer_than_the_budget_ends_with_it(shard, proxy):
    proxy.fail("stall", seconds=5, times=10)
    began = time.monotonic()
    with pytest.raises(StorageError, match="timed out; check that"):
        fetch_range(shard, 0, SIZE, FetchCounts(), budget_s=0.2)
    assert time.monotonic() - began < 2


def test_a_dead_server_is_named_after_the_budget(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"Connection refused; check that http://127\.0\.0\.1:9 can be reached"
    ):
        fetch_range(f"{s3}/k.tar", 0, 1, FetchCounts(), budget_s=0.2)


def test_what_is_missing_is_not_asked_for_twice(shard, proxy):
    with pytest.raises(StorageError, match=r"no\.tar: not found; check the URL"):
        fetch_range(shard.replace("a shard+ö", "no"), 0, 1, FetchCounts())
    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        fetch_range("s3://nowhere/k.tar", 0, 1, FetchCounts())
    assert len(proxy.requests) == 2


def test_a_wrong_secret_is_not_tried_twice(shard, proxy, monkeypatch):
    s3fs.S3FileSystem.clear_instance_cache()  # it holds the right one
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"access refused \(403 \w+\); check AWS_ACCESS_KEY_ID"):
        fetch_range(shard, 0, 1, FetchCounts())
    assert len(proxy.requests) == 1
    s3fs.S3FileSystem.clear_instance_cache()


def test_another_refusal_is_not_tried_twice(shard, proxy):
    proxy.fail("status", status=412)
    with pytest.raises(
        StorageError, match="the storage answers 412 Precondition Failed; check the URL"
    ):
        fetch_range(shard, 0, 1, FetchCounts())
    assert len(proxy.requests) == 1


def test_connections_are_kept_and_one_that_was_closed_is_not_used(shard, proxy):
    counts = FetchCounts()
    fetch_range(shard, 0, 10, counts)
    (idle,) = http_range._idle[os.getpid(), "http", urlsplit(proxy.endpoint).netloc]
    port = idle.sock.getsockname()
    proxy.fail("truncate", after=10)  # all of it, and then the end
    fetch_range(shard, 0, 10, counts)
    assert idle.sock.getsockname() == port
    time.sleep(0.05)
    fetch_range(shard, 0, 10, counts)
    assert (counts.requests, counts.retries) == (3, 0)


def test_threads_share_counts_and_not_connections(shard, proxy):
    counts = FetchCounts()
    with ThreadPool(8) as pool:
        pieces = pool.map(lambda i: fetch_range(shard, i, i + 5000, counts), range(0, SIZE, 5000))
    assert b"".join(pieces) == DATA
    assert (counts.requests, counts.bytes) == (SIZE // 5000, SIZE)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_fetches_after_its_parent_did(shard):
    fetch_range(shard, 0, 10, FetchCounts())
    with multiprocessing.get_context("fork").Pool(2) as pool:
        tasks = [pool.apply_async(_digest, (shard,)) for _ in range(4)]
        assert [task.get(timeout=60) for task in tasks] == 4 * [SHA256]
    assert _digest(shard) == SHA256


def _digest(url: str) -> str:
    return hashlib.sha256(fetch_range(url, 0, SIZE, FetchCounts())).hexdigest()


def test_a_sound_shard_is_read_by_one_request(anywhere):
    counts = FetchCounts()
    assert verified_shard(anywhere, SIZE, SHA256, counts) == DATA
    assert (counts.requests, counts.bytes) == (1, SIZE)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            DATA[:5] + b"\0" + DATA[6:],
            r"its SHA-256 is \w{12}\.\.\., the index says " + SHA256[:12],
        ),
        (
            DATA[:-1024],
            f"it has {SIZE - 1024} bytes, the index says {SIZE}",
        ),  # as if at the end of a tar member
        (DATA + b"\0", f"it has {SIZE + 1} bytes, the index says {SIZE}"),
        (b"", f"it has 0 bytes, the index says {SIZE}"),
    ],
)
def test_a_replaced_or_cut_shard_is_never_taken(anywhere, web, stored, message):
    if anywhere.startswith("http"):
        (web[1] / "s.tar").write_bytes(stored)
    else:
        write_bytes(anywhere, stored)
    with pytest.raises(ShardError, match=message + ".*restore it or pack the data again"):
        verified_shard(anywhere, SIZE, SHA256, FetchCounts())


def test_a_shard_damaged_on_its_way_is_fetched_once_more(shard, proxy):
    proxy.fail("damage", after=SIZE - 1)
    assert verified_shard(shard, SIZE, SHA256, FetchCounts()) == DATA
    proxy.fail("damage", after=0, times=2)
    with pytest.raises(ShardError, match="SHA-256"):
        verified_shard(shard, SIZE, SHA256, FetchCounts())
    assert starts(proxy) == 4 * [0]


def test_a_missing_shard_is_named(anywhere):
    with pytest.raises(
        ShardError, match=r"gone\.tar: not found; check the URL: a shard is missing; restore it"
    ):
        verified_shard(anywhere.rsplit("/", 1)[0] + "/gone.tar", SIZE, SHA256, FetchCounts())


def test_https_trusts_the_given_certificates_and_no_others(web, tmp_path, monkeypatch):
    server, folder = web
    (folder / "s.tar").write_bytes(DATA)
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        *names,
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_port}/s.tar"
    tls_context.cache_clear()
    with pytest.raises(StorageError, match=r"CERTIFICATE_VERIFY_FAILED.*check that localhost"):
        fetch_range(url, 0, SIZE, FetchCounts())
    tls_context.cache_clear()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    assert fetch_range(url, 3, SIZE, FetchCounts()) == DATA[3:]
    tls_context.cache_clear()
