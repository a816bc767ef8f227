"""Storage on a real S3 server and on disk: round trips, and messages of failures."""

import http.client
import multiprocessing
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import aiohttp
import botocore.exceptions
import pytest
import s3fs

from hemoco.errors import StorageError
from hemoco.storage.objects import (
    absolute_url,
    check_writable,
    direct_url,
    exists,
    join_url,
    list_names,
    read_bytes,
    remove,
    write_bytes,
)
from hemoco.storage.retry import is_transient


@pytest.fixture
def forget() -> Iterator[None]:
    """Clears fsspec's cache of filesystems, whose arguments do not contain the keys."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["s3", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder."""
    return (
        request.getfixturevalue("bucket") if request.param == "s3" else (tmp_path / "new").as_uri()
    )


@pytest.mark.parametrize("size", [0, 1, 6 * 1024**2])
def test_bytes_come_back_as_they_were_written(folder, size):
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    write_bytes(f"{folder}/a/b.bin", data)
    assert read_bytes(f"{folder}/a/b.bin") == data


def test_a_plain_path_may_hold_any_character(tmp_path):
    path = tmp_path / "a b%20c #1 ?ö"
    write_bytes(str(path / "k"), b"x")
    assert (path / "k").read_bytes() == read_bytes((path / "k").as_uri()) == b"x"
    assert list_names(str(path)) == ["k"]


def test_a_second_write_replaces_the_first(folder):
    write_bytes(f"{folder}/k", b"the first")
    write_bytes(f"{folder}/k", b"2")
    assert read_bytes(f"{folder}/k") == b"2"


def test_names_are_listed_one_level_deep(folder):
    for name in ("b", "a", "deep/er/c"):
        write_bytes(f"{folder}/{name}", b"x")
    assert list_names(folder) == ["a", "b", "deep"]
    assert list_names(f"{folder}/nothing") == []


def test_remove_takes_everything_below_and_leaves_neighbours(folder):
    for name in ("run/a", "run/deep/b", "run2"):
        write_bytes(f"{folder}/{name}", b"x")
    remove(f"{folder}/run")
    remove(f"{folder}/run")
    assert not exists(f"{folder}/run")
    assert exists(f"{folder}/run2")


def test_checking_that_a_folder_is_writable_leaves_nothing(folder):
    check_writable(folder)
    assert list_names(folder) == []


def test_a_missing_object_is_named(folder):
    with pytest.raises(StorageError, match=r"/no/where: not found; check the URL"):
        read_bytes(f"{folder}/no/where")


def test_a_missing_bucket_is_named(s3):
    with pytest.raises(StorageError, match=r"^s3://nowhere/k: bucket 'nowhere' does not exist"):
        write_bytes("s3://nowhere/k", b"")


def test_a_wrong_secret_says_which_variables_to_check(bucket, forget, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"access refused .* check AWS_ACCESS_KEY_ID") as raised:
        write_bytes(f"{bucket}/k", b"")
    assert "wrong" not in str(raised.value)


def test_missing_keys_say_which_variables_to_set(bucket, forget, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StorageError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        read_bytes(f"{bucket}/k")


def test_an_unreachable_endpoint_is_named_within_seconds(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"check that http://127\.0\.0\.1:9 can be reached"):
        check_writable("s3://hemoco/k")
    assert time.monotonic() - start < 30


def test_an_endpoint_without_a_scheme_says_what_it_must_look_like(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL must look like https://host:port"):
        read_bytes("s3://hemoco/k")


@pytest.mark.parametrize(
    "url",
    ["pipe:cat /etc/passwd", "ftp://host/k", "simplecache::s3://b/k", "ssh://host/k", "exec:ls"],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(
        StorageError, match="is not supported; use s3://, gs://, az://, https://, file:// or a path"
    ):
        read_bytes(url)


@pytest.mark.parametrize("url", ["s3://b/$(x)", "s3://b/`x`", "https://host/a|b", "file:///a\nb"])
def test_urls_that_look_like_commands_are_refused(url):
    with pytest.raises(StorageError, match="is not allowed in a URL"):
        absolute_url(url)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https"])
def test_stores_are_allowed_when_a_bucket_or_host_is_named(scheme):
    assert absolute_url(f"{scheme}://place/folder/") == f"{scheme}://place/folder"
    with pytest.raises(
        StorageError, match=rf"no (bucket|host) is named; use {scheme}://(bucket|host)/folder"
    ):
        list_names(f"{scheme}://")


@pytest.mark.parametrize("url", ["file://../../etc", "file://folder/k"])
def test_a_file_url_without_an_absolute_path_is_refused(url):
    with pytest.raises(StorageError, match="use file:///folder or a plain path"):
        absolute_url(url)


def test_a_missing_package_is_named():
    packages = {
        "gs": "gcsfs",
        "gcs": "gcsfs",
        "az": "adlfs",
        "abfs": "adlfs",
        "http": "aiohttp",
        "https": "aiohttp",
    }
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({[*packages.values()]}));"
        "from hemoco.storage.objects import *; from hemoco.errors import *\n"
        f"for scheme in {[*packages]}:\n"
        "  try: read_bytes(f'{scheme}://b/k')\n  except StorageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    hints = [line.rpartition("pip install ")[2] for line in done.stdout.splitlines()]
    assert hints == [*packages.values()]


@pytest.mark.parametrize("change", [lambda url: write_bytes(url, b""), remove, check_writable])
def test_the_web_is_read_only(change):
    with pytest.raises(StorageError, match=r"http\(s\):// can only be read"):
        change("https://127.0.0.1:9/k")


def test_s3a_is_s3(bucket):
    write_bytes(f"{bucket}/k", b"the same")
    assert read_bytes(f"{bucket}/k".replace("s3://", "s3a://")) == b"the same"


def test_a_direct_url_is_signed_for_the_endpoint_and_not_given_where_a_proxy_stands_between(
    bucket, monkeypatch
):
    url = direct_url(f"{bucket}/k ö")
    assert url.startswith(
        os.environ["AWS_ENDPOINT_URL"]
        + bucket.removeprefix("s3:/")
        + "/k%20%C3%B6?X-Amz-Algorithm="
    )
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert direct_url(f"{bucket}/k") is None
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert direct_url(f"{bucket}/k") is not None


def test_direct_urls_of_the_web_are_themselves_and_files_have_none(tmp_path):
    assert direct_url("https://host/a b?c=d%20e") == "https://host/a%20b?c=d%20e"
    assert direct_url(str(tmp_path)) is None


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_connections_of_its_parent_alone(bucket):
    write_bytes(f"{bucket}/k", b"x")
    with ThreadPool(4) as threads:
        threads.map(read_bytes, 8 * [f"{bucket}/k"])
    for _ in range(3):
        with multiprocessing.get_context("fork").Pool(1) as child:
            assert child.apply(read_bytes, (f"{bucket}/k",)) == b"x"
        write_bytes(f"{bucket}/k", b"x")


class _Answer(Exception):
    """Error with a status like those of aiohttp, Azure and gcsfs."""

    def __init__(self, **fields: int) -> None:
        super().__init__()
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (http.client.RemoteDisconnected(), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), True),
        (botocore.exceptions.SSLError(endpoint_url="x", error="certificate"), False),
        (aiohttp.ServerDisconnectedError(), True),
        (_Answer(status=503), True),
        (_Answer(status_code=429), True),
        (_Answer(code=404), False),
        (
            botocore.exceptions.ClientError(
                {"ResponseMetadata": {"HTTPStatusCode": 500}}, "GetObject"
            ),
            True,
        ),
        (
            botocore.exceptions.ClientError(
                {"ResponseMetadata": {"HTTPStatusCode": 400}}, "GetObject"
            ),
            False,
        ),
        (botocore.exceptions.NoCredentialsError(), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ssl.SSLCertVerificationError(), False),
        (ValueError(), False),
        (KeyError(), False),
    ],
)
def test_faults_of_the_network_are_told_from_those_of_the_request(error, transient):
    assert is_transient(error) == transient


def test_a_name_no_bucket_can_have_is_named(s3):
    with pytest.raises(StorageError, match="'Bad_Bucket!' cannot be the name of a bucket"):
        read_bytes("s3://Bad_Bucket!/k")


def test_a_plain_path_becomes_an_absolute_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_url("some/folder") == (tmp_path / "some" / "folder").as_uri()
    assert join_url(absolute_url("s3://b/p/"), "c", "d") == "s3://b/p/c/d"


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="check the path and the disk"):
        write_bytes(str(tmp_path / "file" / "k"), b"")


def test_local_files_need_no_s3_client():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['s3fs', 'botocore', 'aiobotocore']));"
        "from hemoco.storage.objects import *; from hemoco.errors import *\n"
        "try: read_bytes('/no/where')\nexcept StorageError: print('ok')\n"
        "try: read_bytes('s3://b/k')\nexcept StorageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ok\ns3://b/k: ")
    assert "pip install s3fs" in done.stdout
