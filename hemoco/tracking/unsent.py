"""Metrics that MLflow does not have yet, as files in storage: they outlive the process and its node.

Each file is written once, under a name of its own. Who removes one has therefore delivered all that was in it, however
many processes log to the same run.
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
"""Below a job's folder; in it one folder per MLflow run, named by its id."""
POINTS_PER_CALL = 1000  # MLflow's limit
_SUFFIX = ".jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MetricPoint:
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970. Sent twice with the same one, it is one point in MLflow."""
    step: int


def write_points(folder: str, points: list[MetricPoint]) -> str:
    """Writes a new file below the folder; returns its URL.

    Raises:
        StorageError: the storage refuses or does not answer.
    """
    url = join_url(folder, f"{time.time_ns():020d}_{secrets.token_hex(4)}{_SUFFIX}")
    lines = (
        json.dumps({"key": p.key, "value": p.value, "timestamp": p.timestamp, "step": p.step})
        for p in points
    )
    write_bytes(url, "\n".join(lines).encode())
    return url


def read_points(url: str) -> list[MetricPoint]:
    """What a file holds; nothing where it is gone, because another process has delivered it.

    Raises:
        StorageError: the storage refuses or does not answer.
        TrackingError: it is no file of `write_points`.
    """
    data = b""
    with _unless_gone():
        data = read_bytes(url)
    try:
        return [MetricPoint(**json.loads(line)) for line in data.splitlines()]
    except (ValueError, TypeError) as error:
        raise TrackingError(f"{url}: not a file of kept metrics ({error}); move it away") from error


def remove_points(url: str) -> None:
    """Removes a file, unless it is gone."""
    with _unless_gone():
        remove(url)


def kept_files(folder: str) -> list[str]:
    """The files below a folder, the oldest first."""
    return [join_url(folder, name) for name in list_names(folder) if name.endswith(_SUFFIX)]


def kept_folders(url: str) -> dict[str, list[str]]:
    """Folders of kept metrics below a run's folder, by the id of their MLflow run.

    Jobs are directly below it, units of a job may be one level deeper.
    """
    found: dict[str, list[str]] = {}
    jobs = [join_url(url, name) for name in list_names(url)]
    for job in jobs:
        names = list_names(job)
        for place in (job, *(join_url(job, name) for name in names if name != FOLDER)):
            for run_id in list_names(join_url(place, FOLDER)):
                found.setdefault(run_id, []).append(join_url(place, FOLDER, run_id))
    return found


def deliver_file(url: str, send: Callable[[list[MetricPoint]], None]) -> int:
    """Sends what a file holds, then removes it; returns how many points that were.

    Raises:
        StorageError: the storage refuses or does not answer.
        TrackingError: it is no file of `write_points`, or `send` raised it.
    """
    points = read_points(url)
    for start in range(0, len(points), POINTS_PER_CALL):
        send(points[start : start + POINTS_PER_CALL])
    remove_points(url)
    return len(points)


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
