"""Checks of one machine: this one, or a node of the cluster from inside.

Ray pickles this module by value for the nodes, because a node may lack it. So only the standard
library is imported at its top, and a node without hemoco can still report that it is missing.
"""

import contextlib
import email.utils
import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

PACKAGES = (
    "ray",
    "torch",
    "torchvision",
    "timm",
    "mlflow",
    "webdataset",
    "s3fs",
    "pyarrow",
    "numpy",
)
"""Packages whose versions are compared with the driver's."""
_CLOCK_WARN_S, _CLOCK_FAIL_S = 30.0, 600.0  # S3 refuses requests that are 900 s off


class Finding(NamedTuple):
    """The result of one check."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    """One line; for a failure, what is wrong and what to do."""


class NodeTask(NamedTuple):
    """The checks that a node has to do."""

    name: str
    """Name of the object that the node writes."""
    shards: tuple[str, ...]
    """URLs of shard folders."""
    folder: str
    """URL of a folder below the storage, to write to."""
    greeting: str
    """Text that the driver wrote there; empty if it could not write."""
    tracking: str
    """URI of MLflow; empty if MLflow is not to be checked."""
    cache_bytes: int
    """Size of the shard cache."""
    shm_bytes: tuple[int, int]
    """Shared memory of one training process, and of all."""
    needs_cuda: bool
    modules: tuple[str, ...]
    """Modules that must be importable."""


def check_node(task: NodeTask) -> dict[str, Any]:
    """Checks the node on which it runs.

    Returns:
        Plain values, which the driver can unpickle whatever the node has installed: `host`,
        `versions` (package -> version), `findings` (level, name, text) and `time` by the node's
        clock.
    """
    missing = missing_modules(task.modules)
    checks: list[Finding | None] = [
        checked("software", lambda: _software(missing, task.needs_cuda))
    ]
    if not any(name.startswith("hemoco") for name in missing):
        for name, url in numbered("shards", task.shards):
            checks.append(checked(name, partial(_read_shards, url)))
        checks.append(checked("storage", lambda: _share_storage(task)))
        checks.append(clock_check((task.folder, *task.shards)))
        if task.tracking:
            checks.append(checked("MLflow", lambda: _reach_tracking(task.tracking)))
        checks.append(disk_check(task.cache_bytes))
    checks.append(shm_check(*task.shm_bytes))
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "findings": [tuple(check) for check in checks if check is not None],
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and PACKAGES, without those that are not installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def missing_modules(names: tuple[str, ...]) -> dict[str, str]:
    """Returns the modules that cannot be imported on this machine, with the reason."""
    missing = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation may raise anything
            missing[name] = _first_line(error)
    return missing


def checked(name: str, check: Callable[[], str]) -> Finding:
    """Runs a check, which returns what is well or raises what is not."""
    try:
        return Finding("ok", name, check())
    except Exception as error:  # a check that fails must not hide the others
        # by name, because hemoco may be missing here
        classes = [each.__name__ for each in type(error).__mro__]
        if "HemocoError" in classes or isinstance(error, _FaultError):
            return Finding("FAIL", name, _first_line(error))
        text = f"{classes[0]} (this looks like a bug): {_first_line(error)}"
        return Finding("FAIL", name, text)


def clock_check(urls: tuple[str, ...]) -> Finding | None:
    """Compares this machine's clock with that of the first S3 server of the URLs.

    Returns:
        None if none of the URLs is on S3.
    """
    url = next((url for url in urls if url.startswith(("s3://", "s3a://"))), "")
    if not url:
        return None
    try:
        seconds = _ahead_of_storage(url)
    except Exception as error:  # the checks of the storage report the cause
        text = f"the storage does not return its time: {_first_line(error)}"
        return Finding("warn", "clock", text)
    return judge_clock(seconds, "the S3 server's")


def judge_clock(seconds: float, whose: str) -> Finding:
    """Judges a clock that is so many seconds ahead of another.

    Args:
        seconds: negative if it is behind.
        whose: the other clock, for the message.
    """
    off = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} {whose}"
    if abs(seconds) > _CLOCK_FAIL_S:
        return Finding(
            "FAIL",
            "clock",
            f"{off}; S3 refuses requests that are 15 minutes off: set the clock (NTP)",
        )
    if abs(seconds) > _CLOCK_WARN_S:
        return Finding("warn", "clock", f"{off}; set the clock (NTP)")
    return Finding("ok", "clock", f"within {max(abs(seconds), 1):.0f} s of {whose}")


def disk_check(cache_bytes: int) -> Finding:
    """Checks that the shard cache fits the disk of $HEMOCO_HOME; cached shards count as free."""
    from hemoco.storage.objects import home

    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        cached = sum(
            path.stat().st_size for path in (folder / "shards").rglob("*") if path.is_file()
        )
    except OSError as error:
        return Finding(
            "FAIL",
            "disk",
            f"{folder}: {_first_line(error)}; set HEMOCO_HOME to a folder that can be written",
        )
    if not os.access(folder, os.W_OK):
        return Finding(
            "FAIL", "disk", f"{folder} cannot be written; set HEMOCO_HOME to a folder that can be"
        )
    if free + cached < cache_bytes:
        return Finding(
            "FAIL",
            "disk",
            f"{folder}: {size(free)} free and {size(cached)} cached, stream.disk_cache_bytes is "
            f"{size(cache_bytes)}: lower it, or set HEMOCO_HOME to a larger disk",
        )
    cache = "no shard cache is set"
    if cache_bytes:
        cache = f"a shard cache of {size(cache_bytes)} fits"
    return Finding("ok", "disk", f"{folder}: {size(free)} free; {cache}")


def shm_check(one: int, every: int) -> Finding | None:
    """Checks the size of /dev/shm, through which loader processes pass on their crops.

    Args:
        one: bytes that one training process and its loaders need.
        every: bytes of all processes, if they were all on this machine.

    Returns:
        None on systems without /dev/shm.
    """
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return None
    free = shutil.disk_usage(folder).free
    advice = (
        "give it more (docker --shm-size, a Memory volume on Kubernetes), or lower stream.workers "
        "to 0"
    )
    if free < one:
        return Finding(
            "FAIL",
            "shm",
            f"/dev/shm has {size(free)}, one training process needs {size(one)}: {advice}",
        )
    if free < every:
        return Finding(
            "warn",
            "shm",
            f"/dev/shm has {size(free)}, all processes together need {size(every)}: {advice}",
        )
    return Finding("ok", "shm", f"/dev/shm has {size(free)}, {size(every)} are needed at most")


def numbered(name: str, urls: Sequence[str]) -> list[tuple[str, str]]:
    """Names the check of each URL: with a number if there are several."""
    if len(urls) == 1:
        return [(name, urls[0])]
    return [(f"{name} {number}", url) for number, url in enumerate(urls, 1)]


def size(count: float) -> str:
    """Formats bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _software(missing: dict[str, str], needs_cuda: bool) -> str:
    if missing:
        name, reason = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        advice = "install the dependencies of pyproject.toml there"
        if name.startswith(("hemoco", "pipeline")):
            advice = "start it there from the checkout, or by `python -m jobs submit`"
        raise _FaultError(f"cannot import {name}{more} ({reason}); {advice}")
    if needs_cuda and importlib.import_module("torch").version.cuda is None:
        raise _FaultError(
            "torch is built without CUDA, the recipe needs GPUs; install torch with CUDA there"
        )
    return "all that is needed can be imported"


def _read_shards(url: str) -> str:
    from hemoco.data.shards.index import read_index

    index = read_index(url)
    return f"{url}: {len(index.shards)} shards, index sha {index.digest[:12]}"


def _share_storage(task: NodeTask) -> str:
    from hemoco.storage.objects import exists, join_url, read_bytes, write_bytes

    write_bytes(join_url(task.folder, task.name), b"preflight")
    driver = join_url(task.folder, "driver")
    storage = task.folder.rpartition("/")[0]
    if task.greeting and not (exists(driver) and read_bytes(driver) == task.greeting.encode()):
        raise _FaultError(
            f"{storage} on the node is not the same folder as here: name an s3:// URL or a folder "
            "that all nodes share"
        )
    return f"{storage}: written, and what the driver wrote is read"


def _reach_tracking(uri: str) -> str:
    from hemoco.tracking.client import connect, shown

    connect(uri)
    return f"{shown(uri)} answers"


def _ahead_of_storage(url: str) -> float:
    """Measures how many seconds this machine's clock is ahead of the server's.

    Accurate to a second, the unit of HTTP's Date header.
    """
    from hemoco.storage.objects import filesystem

    s3, path = filesystem(url)
    began = time.time()
    try:
        answer = s3.call_s3("list_objects_v2", Bucket=s3.split_path(path)[0], MaxKeys=1)
    except Exception as error:  # a refusal has a Date header, too
        answer = getattr(error.__cause__, "response", None) or {}
        if "ResponseMetadata" not in answer:
            raise
    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    # the header rounds down: half a second is the mean error
    server_time = email.utils.parsedate_to_datetime(date).timestamp() + 0.5
    return (began + time.time()) / 2 - server_time


class _FaultError(Exception):
    """A fault of a node; not a class of hemoco's, which may be missing there."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
