"""Metrics that MLflow does not have yet, as files in storage, which outlive a process and its node.

Each file is written once, under a name of its own, so that several processes may log to the same
run: whoever removes a file has delivered all of its points.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hemoco.errors import StorageError, TrackingError
from hemoco.storage.objects import join_url, list_names, read_bytes, remove, write_bytes

FOLDER = "unsent_metrics"
"""Folder below a job's folder; in it is one folder for each MLflow run, named by its id."""
POINTS_PER_CALL = 1000
"""MLflow's limit for one call of log_batch."""
_SUFFIX = ".jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricPoint:
    """One value of one metric."""

    key: str
    """Name of the metric."""
    value: float
    timestamp: int
    """Milliseconds since 1970. Sent twice with the same timestamp, a point is one in MLflow."""
    step: int
    """Optimiser steps done."""


def write_points(folder: str, points: list[MetricPoint]) -> str:
    """Writes points to a new file in a folder and returns its URL.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    # the name begins with the time, so that sorted names are in order of age
    url = join_url(folder, f"{time.time_ns():020d}_{secrets.token_hex(4)}{_SUFFIX}")
    # not dataclasses.asdict, which is several times slower: training waits for this before a
    # checkpoint, and a long outage leaves 50,000 points
    lines = [
        json.dumps({"key": p.key, "value": p.value, "timestamp": p.timestamp, "step": p.step})
        for p in points
    ]
    write_bytes(url, "\n".join(lines).encode())
    return url


def read_points(url: str) -> list[MetricPoint]:
    """The points of a file; none if it is gone, because another process has delivered it.

    Raises:
        StorageError: the storage refuses or does not answer.
        TrackingError: the file was not written by `write_points`.
    """
    data = b""
    with _unless_gone():
        data = read_bytes(url)
    try:
        return [MetricPoint(**json.loads(line)) for line in data.splitlines()]
    except (ValueError, TypeError) as error:
        raise TrackingError(f"{url}: not a file of kept metrics ({error}); move it away") from error


def remove_points(url: str) -> None:
    """Removes a file, if it still exists."""
    with _unless_gone():
        remove(url)


def unsent_files(folder: str) -> list[str]:
    """URLs of the files in a folder, the oldest first."""
    return [join_url(folder, name) for name in list_names(folder) if name.endswith(_SUFFIX)]


def unsent_folders(url: str) -> dict[str, list[str]]:
    """Folders of unsent metrics below a run's folder, by the id of their MLflow run.

    A job's folder is directly below the run's folder; units of a job may be one level deeper.
    """
    folders: dict[str, list[str]] = {}
    for job_name in list_names(url):
        job = join_url(url, job_name)
        units = [join_url(job, name) for name in list_names(job) if name != FOLDER]
        for parent in (job, *units):
            for run_id in list_names(join_url(parent, FOLDER)):
                folders.setdefault(run_id, []).append(join_url(parent, FOLDER, run_id))
    return folders


def deliver_file(url: str, send: Callable[[list[MetricPoint]], None]) -> int:
    """Sends the points of a file, then removes it; returns their number.

    Raises:
        StorageError: the storage refuses or does not answer.
        TrackingError: the file was not written by `write_points`, or `send` raised this.
    """
    points = read_points(url)
    for start in range(0, len(points), POINTS_PER_CALL):
        send(points[start : start + POINTS_PER_CALL])
    remove_points(url)
    return len(points)


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Suppresses the error of a file that does not exist."""
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
