"""What preflight looks at on one machine: this one, or a node of the cluster from inside.

This module travels to the nodes by value, for a node may lack it: only the standard library stands at its top, and a
node without hemoco can still say that it is missing.
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
"""Whose versions are compared with the driver's."""
_CLOCK_WARN_S, _CLOCK_FAIL_S = 30.0, 600.0  # S3 refuses what is 900 s off


class Finding(NamedTuple):
    """What one check found."""

    level: Literal["ok", "warn", "FAIL"]
    name: str
    text: str
    """One line; of a failure what is wrong and what to do."""


class NodeTask(NamedTuple):
    """What is looked at on a node."""

    name: str
    """Of the object that it writes."""
    shards: tuple[str, ...]
    """URLs of shard folders."""
    folder: str
    """URL below the storage, to write to."""
    greeting: str
    """What the driver wrote there; empty if it could not."""
    tracking: str
    """URI of MLflow; empty: not asked."""
    cache_bytes: int
    shm_bytes: tuple[int, int]
    """Shared memory of one training process, and of all."""
    needs_cuda: bool
    modules: tuple[str, ...]
    """What must be importable there."""


def look_at_node(task: NodeTask) -> dict[str, Any]:
    """What a node says of itself, in plain values that any Python can read; runs there.

    Returns:
        `host`, `versions` (package -> version), `findings` (level, name, text) and `time` by its clock.
    """
    missing = missing_modules(task.modules)
    checks: list[Finding | None] = [
        checked("software", lambda: _software(missing, task.needs_cuda))
    ]
    if not any(name.startswith("hemoco") for name in missing):
        checks += [
            checked(name, partial(_read_shards, url))
            for name, url in numbered("shards", task.shards)
        ]
        checks.append(checked("storage", lambda: _share_storage(task)))
        checks.append(clock_check((task.folder, *task.shards)))
        if task.tracking:
            checks.append(checked("MLflow", lambda: _ask_tracking(task.tracking)))
        checks.append(disk_check(task.cache_bytes))
    checks.append(shm_check(*task.shm_bytes))
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "findings": [tuple(check) for check in checks if check is not None],
        "time": time.time(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that must agree; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def missing_modules(names: tuple[str, ...]) -> dict[str, str]:
    """Those that cannot be imported on this machine, and why."""
    missing = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation raises what it likes
            missing[name] = _line(error)
    return missing


def checked(name: str, check: Callable[[], str]) -> Finding:
    """The finding of a check that says what is well or raises what is not."""
    try:
        return Finding("ok", name, check())
    except Exception as error:  # one check that fails must not hide the others
        kinds = [kind.__name__ for kind in type(error).__mro__]  # by name: hemoco may be missing
        meant = "HemocoError" in kinds or isinstance(error, _FaultError)
        bug = "" if meant else f"{kinds[0]} (this looks like a bug): "
        return Finding("FAIL", name, f"{bug}{_line(error)}")


def clock_check(urls: tuple[str, ...]) -> Finding | None:
    """This machine's clock beside that of the first S3 server of the URLs; None where there is none."""
    url = next((url for url in urls if url.startswith(("s3://", "s3a://"))), "")
    if not url:
        return None
    try:
        seconds = _ahead_of_storage(url)
    except Exception as error:  # the checks of the storage say what to do about it
        return Finding("warn", "clock", f"the storage does not tell the time: {_line(error)}")
    return judge_clock(seconds, "the S3 server's")


def judge_clock(seconds: float, whose: str) -> Finding:
    """What a clock that is so many seconds ahead of another means."""
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
    """Room for the shard cache below $HEMOCO_HOME; what is cached already counts."""
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
            f"{folder}: {_line(error)}; set HEMOCO_HOME to a folder that can be written",
        )
    if not os.access(folder, os.W_OK):
        return Finding(
            "FAIL", "disk", f"{folder} cannot be written; set HEMOCO_HOME to a folder that can be"
        )
    if free + cached < cache_bytes:
        return Finding(
            "FAIL",
            "disk",
            f"{folder}: {size(free)} free and {size(cached)} cached, stream.disk_cache_bytes is {size(cache_bytes)}: "
            "lower it, or set HEMOCO_HOME to a larger disk",
        )
    wanted = (
        f"a shard cache of {size(cache_bytes)} fits" if cache_bytes else "no shard cache is wanted"
    )
    return Finding("ok", "disk", f"{folder}: {size(free)} free; {wanted}")


def shm_check(one: int, every: int) -> Finding | None:
    """Room in /dev/shm, through which loader processes hand over their crops; None on systems without it.

    Args:
        one: bytes that one training process and its loaders need.
        every: bytes of all, if they were all on this machine.
    """
    place = Path("/dev/shm")
    if not place.is_dir():
        return None
    free = shutil.disk_usage(place).free
    advice = "give it more (docker --shm-size, a Memory volume on Kubernetes), or lower stream.workers to 0"
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
    """A name for the check of each URL: with a number where there are several."""
    return [
        (f"{name} {number}" if len(urls) > 1 else name, url) for number, url in enumerate(urls, 1)
    ]


def size(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _software(missing: dict[str, str], needs_cuda: bool) -> str:
    if missing:
        name, reason = next(iter(missing.items()))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        ours = "start it there from the checkout, or by `python -m jobs submit`"
        advice = (
            ours
            if name.startswith(("hemoco", "pipeline"))
            else "install the dependencies of pyproject.toml there"
        )
        raise _FaultError(f"cannot import {name}{more} ({reason}); {advice}")
    if needs_cuda and importlib.import_module("torch").version.cuda is None:
        raise _FaultError(
            "torch is built without CUDA, the recipe asks for GPUs; install torch with CUDA there"
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
    where = task.folder.rpartition("/")[0]
    if task.greeting and not (exists(driver) and read_bytes(driver) == task.greeting.encode()):
        raise _FaultError(
            f"{where} there is another place than here: name an s3:// URL or a folder that all nodes share"
        )
    return f"{where}: written, and what the driver wrote is read"


def _ask_tracking(uri: str) -> str:
    from hemoco.tracking.client import connect, shown

    connect(uri)
    return f"{shown(uri)} answers"


def _ahead_of_storage(url: str) -> float:
    """Seconds that this machine's clock is ahead of the server's; to within a second, which is what HTTP tells."""
    from hemoco.storage.objects import filesystem

    made, path = filesystem(url)
    began = time.time()
    try:
        answer = made.call_s3("list_objects_v2", Bucket=made.split_path(path)[0], MaxKeys=1)
    except Exception as error:  # a refusal has a date, too
        answer = getattr(error.__cause__, "response", None) or {}
        if "ResponseMetadata" not in answer:
            raise
    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    return (began + time.time()) / 2 - (email.utils.parsedate_to_datetime(date).timestamp() + 0.5)


class _FaultError(Exception):
    """What is wrong with a node; not hemoco's own, which may be missing there."""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
