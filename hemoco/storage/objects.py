"""The only door to files and object storage (fsspec): s3://, gs://, az://, https://, file:// and plain paths.

Filesystem objects are looked up at each call: fsspec caches them per process and thread, and a forked child gets its
own (s3fs's event loop thread does not survive a fork).
"""

import contextlib
import http.client
import os
import re
import ssl
import string
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hemoco.errors import StorageError, UsageError, first_line
from hemoco.storage.retry import loaded_classes
from hemoco.storage.s3_errors import S3Answer, s3_advice, s3_answer

_S3, _GOOGLE, _AZURE, _WEB = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs"), ("http", "https")
# scheme -> the package that fsspec needs for it
_PACKAGES = {
    **dict.fromkeys(_S3, "s3fs"),
    **dict.fromkeys(_GOOGLE, "gcsfs"),
    **dict.fromkeys(_AZURE, "adlfs"),
    **dict.fromkeys(_WEB, "aiohttp"),
}
_LOCAL = ("file", "memory")
# no URL goes through a shell here; one that looks as if it should is not the name of data
_SHELL = re.compile(r"[\x00-\x1f`|]|\$\(")
# rclone answers ranges with the whole object's checksum, which botocore then refuses, and refuses signatures of version
# 2, which botocore still puts into URLs
_S3_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "signature_version": "s3v4",
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 3, "mode": "standard"},
}
_SIGNED_S = 900
# kept for ever: a forked child that let go of its parent's would close their connections, and the parent would hang
_made: dict[int, AbstractFileSystem] = {}


def home() -> Path:
    """`$HEMOCO_HOME`, default ~/.cache/hemoco: what hemoco keeps on this machine."""
    return Path(os.environ.get("HEMOCO_HOME") or "~/.cache/hemoco").expanduser().resolve()


def absolute_url(url: str) -> str:
    """The URL itself, or a plain path as an absolute file:// URL.

    Raises:
        StorageError: the scheme is none of ours, or the URL names no bucket or host, or looks like a shell command.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc
    if scheme == "":
        return Path(url).expanduser().resolve().as_uri()
    if scheme not in (*_PACKAGES, *_LOCAL):
        allowed = "s3://, gs://, az://, https://, file:// or a path"
        raise StorageError(f"{url}: scheme {scheme}:// is not supported; use {allowed}")
    if found := _SHELL.search(url):
        raise StorageError(f"{url!r}: {found.group()!r} is not allowed in a URL; rename the object")
    if scheme in _PACKAGES and not host:
        place = "host" if scheme in _WEB else "bucket"
        raise StorageError(f"{url}: no {place} is named; use {scheme}://{place}/folder")
    if scheme == "file" and host not in ("", "localhost"):
        raise StorageError(
            f"{url}: {host!r} stands where a host would; use file:///folder or a plain path"
        )
    return url.rstrip("/")


def check_url(name: str, url: str) -> None:
    """Refuses a path where a URL is wanted: on another machine, or in another folder, it means something else.

    Raises:
        UsageError: it is a path; `name` says of what.
    """
    if "://" not in url:
        raise UsageError(
            f"{name} is {url}: give a URL; that of a path is hemoco.storage.objects.absolute_url(path)"
        )


def join_url(url: str, *names: str) -> str:
    """A URL below another."""
    return "/".join([url.rstrip("/"), *names])


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, made in this process, and the path of the URL in it."""
    url = absolute_url(url)
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {}
    if scheme in _S3:
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        options = {
            "endpoint_url": endpoint,
            "config_kwargs": _S3_CONFIG,
            "use_listings_cache": False,
        }
    if (
        scheme in _AZURE
    ):  # the account may stand where a host would, and only this function looks there
        made, _ = fsspec.core.url_to_fs(f"{scheme}://{urlsplit(url).netloc}")
    else:
        made = fsspec.filesystem(scheme, **options)
    _made[id(made)] = made
    # fsspec leaves the %20 of a file:// URL as it is
    return made, url2pathname(
        urlsplit(url).path
    ) if scheme == "file" else fsspec.core.strip_protocol(url)


def direct_url(url: str) -> str | None:
    """Where a plain HTTP GET reads the object within the next minutes; None if only fsspec can.

    Hold it secret: a signature in it opens the object to whoever has it.
    """
    url = absolute_url(url)
    scheme = urlsplit(url).scheme
    found = None
    if scheme in _S3:
        made, path = filesystem(url)
        found = str(made.sign(path, expiration=_SIGNED_S))
    elif scheme in _WEB:
        found = quote(url, safe=string.punctuation)
    return None if found is None or _goes_by_proxy(found) else found


def forkable_client(url: str) -> str | None:
    """The module that reads a URL, if a process that has imported it may fork: importing it takes half a second."""
    return (
        "s3fs" if urlsplit(absolute_url(url)).scheme in _S3 else None
    )  # gRPC, which gcsfs may import, may not


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Whom to trust: the certificates in AWS_CA_BUNDLE, else those of the system and of certifi."""
    bundle = os.environ.get("AWS_CA_BUNDLE")
    context = ssl.create_default_context(cafile=bundle)
    with contextlib.suppress(ImportError):
        import certifi

        if not bundle:  # small images have no certificates of the system
            context.load_verify_locations(certifi.where())
    return context


def read_bytes(url: str) -> bytes:
    """The whole object.

    Raises:
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        made, path = filesystem(url)
        return bytes(made.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Creates or replaces an object in one step: readers see the old one or the new one.

    Raises:
        StorageError: the bucket is missing, or the storage refuses or does not answer.
    """
    _refuse_web(url)
    with storage_errors(url):
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
    with storage_errors(url):
        made, path = filesystem(url)
        return bool(made.exists(path))


def list_names(url: str) -> list[str]:
    """Names directly below a URL, sorted; empty where there is nothing.

    Raises:
        StorageError: the bucket is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        made, path = filesystem(url)
        try:
            found = made.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            if (
                s3_answer(error) is not None
            ):  # a server lists an empty folder; it said that there is no bucket
                raise
            return []
        return sorted(
            name.rstrip("/").rsplit("/", 1)[-1]
            for name in found
            if name.rstrip("/") != path.rstrip("/")
        )


def remove(url: str) -> None:
    """Removes an object, or everything below the URL; nothing to do where there is nothing.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    _refuse_web(url)
    with storage_errors(url):
        made, path = filesystem(url)
        if made.exists(path):
            made.rm(path, recursive=True)
            if made.exists(path):  # s3fs does not say which deletions a server refused
                raise StorageError(
                    f"{url}: cannot be removed; ask for s3:DeleteObject: the key may not do this"
                )


def check_writable(url: str) -> None:
    """Writes and removes a small object below the URL, so that a wrong one fails now and not after hours.

    Raises:
        StorageError: as `write_bytes`.
    """
    probe = join_url(absolute_url(url), f".hemoco_probe_{os.getpid()}")
    write_bytes(probe, b"probe")
    remove(probe)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns what fsspec, its packages and HTTP raise into one line that says what to do.

    Raises:
        StorageError: anything of theirs was raised in the block.
    """
    try:
        yield
    except _foreign_errors() as error:
        raise StorageError(f"{url}: {_explanation(url, error)}") from error


def storage_hint(url: str, error: Exception) -> str:
    """What to do about an error that is neither of a missing object nor of a refusal."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc
    if isinstance(error, ImportError) and scheme in _PACKAGES:
        return f"pip install {_PACKAGES[scheme]}"
    if scheme in _S3:
        hints = {
            "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            "ParamValidationError": f"{host!r} cannot be the name of a bucket",
            "ValueError": "AWS_ENDPOINT_URL must look like https://host:port",
            "ResponseParserError": f"{_endpoint()} is no S3 server; correct AWS_ENDPOINT_URL",
        }
        if "WRONG_VERSION_NUMBER" in str(error):
            return f"{_endpoint()} does not speak TLS: correct AWS_ENDPOINT_URL (http:// instead of https://?)"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return f"the certificate of {_endpoint()} is not trusted: name its authority's file in AWS_CA_BUNDLE"
        return hints.get(type(error).__name__, f"check that {_endpoint()} can be reached")
    if scheme in _PACKAGES:
        return f"check that {host if scheme in _WEB else 'its service'} can be reached"
    return "check the path and the disk"


def _explanation(url: str, error: Exception) -> str:
    """What is wrong and what to do about it."""
    if urlsplit(url).scheme in _S3 and (answer := _reason(url, error)) is not None:
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        if (advice := s3_advice(answer, urlsplit(url).netloc, _endpoint(), region)) is not None:
            return advice
    if isinstance(error, FileNotFoundError):
        return "not found; check the URL"
    if isinstance(error, PermissionError):
        keys = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            if urlsplit(url).scheme in _S3
            else "its permissions"
        )
        return f"access refused ({first_line(error)}); check {keys}"
    return f"{first_line(error)}; {storage_hint(url, error)}"


def _reason(url: str, error: Exception) -> S3Answer | None:
    """What the server said; of a refusal to HEAD, whose answer has no room for a reason, what it says to GET."""
    answer = s3_answer(error)
    if answer is None or not answer.nameless or answer.status == http.HTTPStatus.NOT_FOUND:
        return answer
    made, path = filesystem(url)
    bucket, key, _ = made.split_path(path)
    try:
        made.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
    except _foreign_errors() as refusal:
        return s3_answer(refusal) or answer
    return answer


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL", "the default endpoint")


def _foreign_errors() -> tuple[type[Exception], ...]:
    own = loaded_classes(
        "botocore.exceptions:BotoCoreError",
        "botocore.parsers:ResponseParserError",
        "aiohttp:ClientError",
        "azure.core.exceptions:AzureError",
        "google.auth.exceptions:GoogleAuthError",
        "gcsfs.retry:HttpError",
    )
    return (OSError, ValueError, ImportError, http.client.HTTPException, *own)


def _goes_by_proxy(url: str) -> bool:
    """Whether the user's environment sends requests for this URL through a proxy."""
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


def _refuse_web(url: str) -> None:
    if urlsplit(url).scheme in _WEB:
        raise StorageError(
            f"{url}: http(s):// can only be read; write to s3://, gs://, az:// or a path"
        )
