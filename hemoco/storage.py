"""The only door to files and object storage (fsspec): s3://, file://, memory:// and plain paths.

Filesystem objects are looked up at each call and never kept: fsspec caches them per process and thread, and a
forked child gets its own (s3fs's event loop thread does not survive a fork).
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hemoco.errors import StorageError

_SCHEMES = ("s3", "file", "memory")
# rclone answers ranges with the whole object's checksum, which botocore then refuses
_S3_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 3, "mode": "standard"},
}


def absolute_url(url: str) -> str:
    """The URL itself, or a plain path as an absolute file:// URL.

    Raises:
        StorageError: the scheme is none of s3, file, memory, or s3:// names no bucket.
    """
    scheme = urlsplit(url).scheme
    if scheme == "s3" and not urlsplit(url).netloc:
        raise StorageError(f"{url}: no bucket is named; use s3://bucket/folder")
    if scheme == "":
        return Path(url).expanduser().resolve().as_uri()
    if scheme not in _SCHEMES:
        raise StorageError(f"{url}: scheme {scheme}:// is not supported; use s3://, file:// or a path")
    return url.rstrip("/")


def join_url(url: str, *names: str) -> str:
    """A URL below another."""
    return "/".join([url.rstrip("/"), *names])


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, made in this process, and the path of the URL in it."""
    url = absolute_url(url)
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        options = {"endpoint_url": endpoint, "config_kwargs": _S3_CONFIG, "use_listings_cache": False}
    made = fsspec.filesystem(scheme, **options)
    return made, made._strip_protocol(url)


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    with _named(url):
        made, path = filesystem(url)
        return bytes(made.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Creates or replaces an object in one step: readers see the old one or the new one.

    Raises:
        StorageError: the bucket is missing, or the storage refuses or does not answer.
    """
    with _named(url):
        made, path = filesystem(url)
        if isinstance(made, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            partial = Path(f"{path}.{os.getpid()}.partial")
            partial.write_bytes(data)
            partial.replace(path)
        else:
            made.pipe_file(path, data)


def exists(url: str) -> bool:
    """Whether there is an object, or anything below the URL as a folder."""
    with _named(url):
        made, path = filesystem(url)
        return bool(made.exists(path))


def list_names(url: str) -> list[str]:
    """Names directly below a URL, sorted; empty where there is nothing."""
    with _named(url):
        made, path = filesystem(url)
        try:
            found = made.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found if name.rstrip("/") != path.rstrip("/"))


def remove(url: str) -> None:
    """Removes an object, or everything below the URL; nothing to do where there is nothing."""
    with _named(url):
        made, path = filesystem(url)
        if made.exists(path):
            made.rm(path, recursive=True)


def check_writable(url: str) -> None:
    """Writes and removes a small object below the URL, so that a wrong one fails now and not after hours.

    Raises:
        StorageError: as `write_bytes`.
    """
    probe = join_url(absolute_url(url), f".hemoco_probe_{os.getpid()}")
    write_bytes(probe, b"probe")
    remove(probe)


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Turns what fsspec, s3fs and botocore raise into one line that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        if "bucket" in str(error).lower():
            bucket = urlsplit(url).netloc
            raise StorageError(f"{url}: bucket {bucket!r} does not exist; create it or correct the URL") from error
        raise StorageError(f"{url}: not found; check the URL") from error
    except PermissionError as error:
        hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if url.startswith("s3:") else "check its permissions"
        raise StorageError(f"{url}: access refused ({_first_line(error)}); {hint}") from error
    except _foreign_errors() as error:
        raise StorageError(f"{url}: {_first_line(error)}; {_hint(url, error)}") from error


def _hint(url: str, error: Exception) -> str:
    """What to do about an error that is neither of a missing object nor of a refusal."""
    if not url.startswith("s3:"):
        return "check the path and the disk"
    hints = {
        "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "ParamValidationError": f"{urlsplit(url).netloc!r} cannot be the name of a bucket",
        "ImportError": "pip install s3fs",
        "ValueError": "AWS_ENDPOINT_URL must look like https://host:port",
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "the default endpoint")
    return hints.get(type(error).__name__, f"check that {endpoint} can be reached")


def _foreign_errors() -> tuple[type[Exception], ...]:
    """With botocore's own once something has imported it: local files need no S3 client installed."""
    loaded = sys.modules.get("botocore.exceptions")
    return (OSError, ValueError, ImportError, *((loaded.BotoCoreError,) if loaded else ()))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
