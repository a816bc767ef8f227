"""Files and objects by URL, through fsspec: s3://, gs://, az://, https://, file:// and plain paths.

No other package uses fsspec. Filesystems are looked up again for each call instead of being kept by
the caller: fsspec caches them for each process and thread, and a forked child gets its own (the
thread of s3fs's event loop does not survive a fork).
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
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from hemoco.errors import StorageError, UsageError, first_line
from hemoco.storage.retry import loaded_classes
from hemoco.storage.s3_errors import S3Answer, s3_advice, s3_answer

_S3, _GOOGLE, _AZURE, _WEB = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs"), ("http", "https")
_PACKAGES = {
    **dict.fromkeys(_S3, "s3fs"),
    **dict.fromkeys(_GOOGLE, "gcsfs"),
    **dict.fromkeys(_AZURE, "adlfs"),
    **dict.fromkeys(_WEB, "aiohttp"),
}
"""The package that fsspec needs for a scheme."""
_LOCAL = ("file", "memory")
# No URL is passed to a shell here. A URL that looks like a command was meant for another tool.
_SHELL = re.compile(r"[\x00-\x1f`|]|\$\(")
_S3_CONFIG = {
    # rclone answers a range with the checksum of the whole object, which botocore would refuse
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    # botocore still signs URLs with version 2, which rclone refuses
    "signature_version": "s3v4",
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 3, "mode": "standard"},
}
_SIGNED_S = 900
# Filesystems are kept for the life of the process. A forked child that dropped its parent's would
# close their connections, and the parent would hang
# (test_a_forked_child_leaves_the_connections_of_its_parent_alone).
_filesystems: dict[int, AbstractFileSystem] = {}


def home() -> Path:
    """The folder for caches on this machine: `$HEMOCO_HOME`, by default ~/.cache/hemoco."""
    return Path(os.environ.get("HEMOCO_HOME") or "~/.cache/hemoco").expanduser().resolve()


def absolute_url(url: str) -> str:
    """The URL itself, or a plain path as an absolute file:// URL.

    Raises:
        StorageError: the scheme is not supported, or the URL names no bucket or host, or looks like
            a shell command.
    """
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc
    if scheme == "":
        return Path(url).expanduser().resolve().as_uri()
    if scheme not in (*_PACKAGES, *_LOCAL):
        allowed = "s3://, gs://, az://, https://, file:// or a path"
        raise StorageError(f"{url}: scheme {scheme}:// is not supported; use {allowed}")
    command = _SHELL.search(url)
    if command:
        raise StorageError(
            f"{url!r}: {command.group()!r} is not allowed in a URL; rename the object"
        )
    if scheme in _PACKAGES and not host:
        missing = "host" if scheme in _WEB else "bucket"
        raise StorageError(f"{url}: no {missing} is named; use {scheme}://{missing}/folder")
    if scheme == "file" and host not in ("", "localhost"):
        raise StorageError(
            f"{url}: {host!r} is in the place of a host; use file:///folder or a plain path"
        )
    return url.rstrip("/")


def check_url(name: str, url: str) -> None:
    """Refuses a path, which on another machine or in another folder would be another file.

    Args:
        name: name of the setting, for the message.
        url: its value.

    Raises:
        UsageError: it is a path.
    """
    if "://" not in url:
        raise UsageError(
            f"{name} is {url}: give a URL; that of a path is "
            "hemoco.storage.objects.absolute_url(path)"
        )


def join_url(url: str, *names: str) -> str:
    """A URL below another."""
    return "/".join([url.rstrip("/"), *names])


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL, made in this process, and the path of the URL in it."""
    url = absolute_url(url)
    scheme = urlsplit(url).scheme
    if scheme in _AZURE:
        # only url_to_fs finds an account that is part of the URL (az://container@account/...)
        files, _ = fsspec.core.url_to_fs(f"{scheme}://{urlsplit(url).netloc}")
    elif scheme in _S3:
        files = fsspec.filesystem(
            scheme,
            endpoint_url=os.environ.get("AWS_ENDPOINT_URL"),
            config_kwargs=_S3_CONFIG,
            use_listings_cache=False,  # other processes write, too
        )
    else:
        files = fsspec.filesystem(scheme)
    _filesystems[id(files)] = files
    if scheme == "file":
        return files, url2pathname(urlsplit(url).path)  # fsspec would leave %20 as it is
    return files, fsspec.core.strip_protocol(url)


def direct_url(url: str) -> str | None:
    """A URL at which a plain HTTP GET reads the object within the next minutes.

    Keep it secret: its signature gives access to the object.

    Returns:
        None if only fsspec can read the object, or if a proxy must be used.
    """
    url = absolute_url(url)
    scheme = urlsplit(url).scheme
    if scheme in _S3:
        files, path = filesystem(url)
        direct = str(files.sign(path, expiration=_SIGNED_S))
    elif scheme in _WEB:
        direct = quote(url, safe=string.punctuation)
    else:
        return None
    return None if _goes_by_proxy(direct) else direct


def forkable_client(url: str) -> str | None:
    """The module that reads a URL, if a process that has imported it may fork.

    Importing it takes half a second, which forked loader processes save.
    """
    # not gcsfs: it may import gRPC, whose threads do not survive a fork
    return "s3fs" if urlsplit(absolute_url(url)).scheme in _S3 else None


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """Trusted certificates: those in AWS_CA_BUNDLE, or else those of the system and of certifi."""
    bundle = os.environ.get("AWS_CA_BUNDLE")
    context = ssl.create_default_context(cafile=bundle)
    with contextlib.suppress(ImportError):
        import certifi

        if not bundle:  # small container images have no system certificates
            context.load_verify_locations(certifi.where())
    return context


def read_bytes(url: str) -> bytes:
    """Reads a whole object.

    Raises:
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        files, path = filesystem(url)
        return bytes(files.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Creates or replaces an object atomically: readers see the old one or the new one.

    Raises:
        StorageError: the bucket is missing, or the storage refuses or does not answer.
    """
    _refuse_web(url)
    with storage_errors(url):
        files, path = filesystem(url)
        if isinstance(files, LocalFileSystem):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            partial = Path(f"{path}.{os.getpid()}.partial")
            partial.write_bytes(data)
            partial.replace(path)
        else:
            files.pipe_file(path, data)


def exists(url: str) -> bool:
    """Returns True if there is an object at the URL, or anything below it as a folder."""
    with storage_errors(url):
        files, path = filesystem(url)
        return bool(files.exists(path))


def list_names(url: str) -> list[str]:
    """Names directly below a URL, sorted; empty where there is nothing.

    Raises:
        StorageError: the bucket is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        files, path = filesystem(url)
        try:
            paths = files.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            # a server lists an empty folder without an error: an answer means a missing bucket
            if s3_answer(error) is not None:
                raise
            return []
        # some filesystems list the folder itself, too
        below = [each.rstrip("/") for each in paths if each.rstrip("/") != path.rstrip("/")]
        return sorted(each.rsplit("/", 1)[-1] for each in below)


def remove(url: str) -> None:
    """Removes an object, or everything below the URL, if there is anything.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    _refuse_web(url)
    with storage_errors(url):
        files, path = filesystem(url)
        if files.exists(path):
            files.rm(path, recursive=True)
            if files.exists(path):  # s3fs does not report the deletions that a server refused
                raise StorageError(
                    f"{url}: cannot be removed; ask for s3:DeleteObject: the key may not do this"
                )


def check_writable(url: str) -> None:
    """Writes and removes a small object below the URL, so that a wrong URL fails at the start.

    Raises:
        StorageError: see `write_bytes` and `remove`.
    """
    probe = join_url(absolute_url(url), f".hemoco_probe_{os.getpid()}")
    write_bytes(probe, b"probe")
    remove(probe)


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turns errors of fsspec, its packages and HTTP into one line with what to do.

    Raises:
        StorageError: the block raised one of these errors, which is its cause.
    """
    try:
        yield
    except _foreign_errors() as error:
        raise StorageError(f"{url}: {_explanation(url, error)}") from error


def storage_hint(url: str, error: Exception) -> str:
    """Advice for an error other than a missing object or a refusal."""
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
            return (
                f"{_endpoint()} does not speak TLS: correct AWS_ENDPOINT_URL "
                "(http:// instead of https://?)"
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return (
                f"the certificate of {_endpoint()} is not trusted: "
                "name its authority's file in AWS_CA_BUNDLE"
            )
        return hints.get(type(error).__name__, f"check that {_endpoint()} can be reached")
    if scheme in _PACKAGES:
        return f"check that {host if scheme in _WEB else 'its service'} can be reached"
    return "check the path and the disk"


def _explanation(url: str, error: Exception) -> str:
    """The cause of an error, and advice."""
    on_s3 = urlsplit(url).scheme in _S3
    answer = _s3_reason(url, error) if on_s3 else None
    if answer is not None:
        region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
        advice = s3_advice(answer, urlsplit(url).netloc, _endpoint(), region)
        if advice is not None:
            return advice
    if isinstance(error, FileNotFoundError):
        return "not found; check the URL"
    if isinstance(error, PermissionError):
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if on_s3 else "its permissions"
        return f"access refused ({first_line(error)}); check {keys}"
    return f"{first_line(error)}; {storage_hint(url, error)}"


def _s3_reason(url: str, error: Exception) -> S3Answer | None:
    """The answer of an S3 server that refused a request, with its reason; None for other errors.

    The answer to a HEAD request has no body and so no reason. Then the object is requested with
    GET, whose answer has one.
    """
    answer = s3_answer(error)
    if answer is None or not answer.nameless or answer.status == http.HTTPStatus.NOT_FOUND:
        return answer
    files, path = filesystem(url)
    bucket, key, _ = files.split_path(path)
    try:
        files.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
    except _foreign_errors() as refusal:
        return s3_answer(refusal) or answer
    return answer


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL", "the default endpoint")


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Errors of fsspec and the clients behind it, as far as these are imported."""
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
    """True if the proxy variables of the environment (`https_proxy`, ...) apply to a URL."""
    parts = urlsplit(url)
    return parts.scheme in getproxies() and not proxy_bypass(parts.hostname or "")


def _refuse_web(url: str) -> None:
    if urlsplit(url).scheme in _WEB:
        raise StorageError(
            f"{url}: http(s):// can only be read; write to s3://, gs://, az:// or a path"
        )
