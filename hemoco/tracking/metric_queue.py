"""A queue of metrics that its own thread sends to MLflow.

Logging never waits for MLflow. An outage loses no point, nor does a kill: steps since the last
checkpoint are repeated, and all older points are in storage. A point is

- in memory until it is delivered;
- from `keep` on also in a file in storage (`hemoco.tracking.unsent`), which outlives the process;
- in a file only, if a killed attempt left it there or a long outage moved it out of memory.

A point that is sent twice, with the same timestamp, is one point in MLflow. Where it is unknown
whether a point was delivered, it is sent again.
"""

import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self

from tenacity import sleep_using_event, stop_when_event_set

from hemoco.errors import RefusedError, StorageError, TrackingError
from hemoco.storage.retry import RetryPolicy, retrying
from hemoco.tracking.client import ask, client_type
from hemoco.tracking.unsent import (
    POINTS_PER_CALL,
    MetricPoint,
    read_points,
    remove_points,
    unsent_files,
    write_points,
)

logger = logging.getLogger(__name__)

_SEND_EVERY_S = 2.0
_CLOSE_S = 60.0
_CLOSE_AFTER_ERROR_S = 10.0
_POINTS_IN_MEMORY = 50_000
_STORAGE_PAUSE_S = 60.0
"""Seconds after which points are moved to storage again, once a write has failed."""


def _any_exception(error: BaseException) -> bool:
    return isinstance(error, Exception)


_RETRIES = RetryPolicy(is_transient=_any_exception, first_wait_s=4.0, longest_wait_s=60.0)
_RETRIES_AT_CLOSE = RetryPolicy(is_transient=_any_exception, first_wait_s=1.0, longest_wait_s=2.0)


class MetricQueue:
    """Sends logged metrics within seconds. A context manager.

    A failed delivery is retried with growing pauses. Several queues, also of several processes, may
    share one folder.
    """

    def __init__(self, send: Callable[[list[MetricPoint]], None], unsent: str) -> None:
        """Starts the thread, which first delivers what a killed attempt left in the folder.

        Args:
            send: delivers at most 1000 points, or raises; RefusedError if it would always raise.
            unsent: URL of a folder for undelivered points of this run.
        """
        self._send = send
        self._unsent = unsent
        # shared by both threads, under the lock: points in memory are numbered from the start of
        # the queue, and the oldest in memory has the number `_forgotten`
        self._lock = threading.Lock()
        self._points: deque[MetricPoint] = deque()
        self._forgotten = 0
        self._backup = ""  # file with the points in memory up to the number `_backup_end`
        self._backup_end = 0
        self._obsolete: list[str] = []  # files whose points are delivered, or in a newer backup
        # of the sending thread alone
        self._files: deque[str] = deque()  # files whose points are not in memory, oldest first
        self._outage = False
        self._refused = False
        self._next_move_time = 0.0
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._storage_warned = False
        try:
            self._files += unsent_files(unsent)
        except StorageError as error:
            self._warn_of_storage(error)
        # a daemon: a process that fails before `close` must be able to end
        self._thread = threading.Thread(
            target=self._deliver_until_closed, name="hemoco-metrics", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(_CLOSE_S if error is None else _CLOSE_AFTER_ERROR_S)

    @property
    def delivered(self) -> bool:
        """True if MLflow has all logged points, and all that killed attempts left."""
        return not self._points and not self._files

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the values of one step to the queue."""
        now = time.time_ns() // 1_000_000
        points = [
            MetricPoint(key=key, value=float(value), timestamp=now, step=step)
            for key, value in metrics.items()
        ]
        with self._lock:
            self._points += points

    def keep(self) -> None:
        """Writes all undelivered points to storage; to be called before a checkpoint is written.

        A run that resumes from the checkpoint does not log the steps before it again. This does not
        wait for MLflow, not even for a moment: one small write is cheaper. A failed write is warned
        of, once, and not raised.
        """
        with self._lock:
            points = list(self._points)
            end = self._forgotten + len(points)
        if not points or end == self._backup_end:
            return
        backup = self._write(points)
        if backup:
            with self._lock:
                self._obsolete.append(self._backup)
                self._backup = backup
                self._backup_end = end

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Sends the rest; what is not delivered in time stays in storage, with a warning."""
        if self._outage:
            self.keep()  # this process may be killed while it waits for the thread
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        self.keep()
        self._remove_obsolete()
        with self._lock:
            left = len(self._points)
            stored = max(0, self._backup_end - self._forgotten)
        if not self.delivered:
            logger.warning(
                "event=metrics_unsent points=%d older_files=%d folder=%s; once MLflow answers: "
                "python -m jobs sync RUN (RUN: the name of the run), or resume the run",
                stored,
                len(self._files),
                self._unsent,
            )
        if left > stored:
            logger.error(
                "event=metrics_lost points=%d; neither MLflow nor %s took them",
                left - stored,
                self._unsent,
            )

    def _deliver_until_closed(self) -> None:
        """Body of the thread."""
        closing = self._closing
        # `close` ends a pause between two attempts at once
        patient = retrying(_RETRIES).copy(
            sleep=sleep_using_event(closing), stop=stop_when_event_set(closing)
        )
        while not closing.wait(_SEND_EVERY_S):
            with contextlib.suppress(Exception):  # logged by `_deliver`
                patient(self._deliver)
        left_s = max(0.0, self._deadline - time.monotonic())
        with contextlib.suppress(Exception):
            retrying(dataclasses.replace(_RETRIES_AT_CLOSE, budget_s=left_s))(self._deliver)

    def _deliver(self) -> None:
        """Sends all points; logs a failure, and raises it if another attempt may succeed."""
        try:
            if not self._refused:
                self._deliver_files()
                self._deliver_memory()
        except RefusedError as error:
            self._refused = True
            self._outage = True
            logger.error(
                "event=metrics_refused %s; not tried again, metrics are kept in %s",
                error,
                self._unsent,
            )
        except Exception as error:
            # of any kind: training must go on and the metrics must be kept
            if not self._outage:
                logger.warning("event=metrics_outage %s; metrics are kept and sent later", error)
            self._outage = True
            raise
        finally:
            self._bound_memory()
            self._remove_obsolete()

    def _deliver_files(self) -> None:
        while self._files and time.monotonic() < self._deadline:
            url = self._files[0]
            try:
                points = read_points(url)
            except StorageError as error:
                self._warn_of_storage(error)
                return
            except TrackingError as error:
                # a damaged file is left where it is, for its owner to look at
                logger.warning("event=metrics_damaged %s", error)
            else:
                for start in range(0, len(points), POINTS_PER_CALL):
                    self._send_batch(points[start : start + POINTS_PER_CALL])
                self._remove(url)
            self._files.popleft()
            self._bound_memory()

    def _deliver_memory(self) -> None:
        while time.monotonic() < self._deadline:
            batch = self._oldest(POINTS_PER_CALL)
            if not batch:
                return
            self._send_batch(batch)
            self._forget(len(batch))
            self._bound_memory()

    def _send_batch(self, batch: list[MetricPoint]) -> None:
        self._send(batch)
        if self._outage:
            logger.warning("event=metrics_outage_over")
        self._outage = False

    def _bound_memory(self) -> None:
        """Moves the older points to a file if a long outage has filled the memory."""
        if len(self._points) <= _POINTS_IN_MEMORY or time.monotonic() < self._next_move_time:
            return
        oldest = self._oldest(len(self._points) - _POINTS_IN_MEMORY // 2)
        url = self._write(oldest)
        if url:
            self._files.append(url)
            self._forget(len(oldest))
        else:
            # not at every call: a storage that does not answer would hold up the delivery
            self._next_move_time = time.monotonic() + _STORAGE_PAUSE_S

    def _oldest(self, count: int) -> list[MetricPoint]:
        with self._lock:
            return list(itertools.islice(self._points, count))

    def _forget(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                self._points.popleft()
            self._forgotten += count

    def _remove_obsolete(self) -> None:
        with self._lock:
            if self._forgotten >= self._backup_end:
                self._obsolete.append(self._backup)
                self._backup = ""
            obsolete = self._obsolete
            self._obsolete = []
        for url in obsolete:
            if url:  # empty: there was no backup
                self._remove(url)

    def _write(self, points: list[MetricPoint]) -> str:
        """Writes points to storage; returns the URL of the file, empty if the write failed."""
        try:
            return write_points(self._unsent, points)
        except Exception as error:
            # training goes on; if the storage is really gone, the next checkpoint raises
            self._warn_of_storage(error)
            return ""

    def _remove(self, url: str) -> None:
        try:
            remove_points(url)
        except Exception as error:
            # its points are delivered once more later, which changes nothing in MLflow
            self._warn_of_storage(error)

    def _warn_of_storage(self, error: Exception) -> None:
        if not self._storage_warned:
            logger.warning(
                "event=metrics_storage %s; until it answers, undelivered metrics are in memory "
                "alone",
                error,
            )
        self._storage_warned = True


class Tracker(MetricQueue):
    """Metrics of one MLflow run, sent while training goes on.

    Args:
        uri: URI of the tracking server.
        run_id: id of the run.
        unsent: URL of the folder for undelivered points, `JOB/unsent_metrics/RUN_ID`, where a
            resumed training and `python -m jobs sync` look for them.
    """

    def __init__(self, uri: str, run_id: str, unsent: str) -> None:
        # imports mlflow here, as two threads must not import it at the same time
        client_type()
        self.step: int | None = None
        """Step of the last values logged; None before the first."""
        super().__init__(partial(send_points, uri, run_id), unsent)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the values of one step to the queue."""
        self.step = step
        super().log(step, metrics)


def check_delivered(tracker: Tracker) -> None:
    """Raises unless MLflow has all metrics: a comparison reads them from MLflow alone.

    Args:
        tracker: closed.

    Raises:
        TrackingError: some metrics are not delivered.
    """
    if not tracker.delivered:
        raise TrackingError(
            "MLflow has not taken all metrics, which are kept beside the checkpoints: when it "
            "answers again, run the same command again; it resumes from the last checkpoint"
        )


def send_points(
    uri: str, run_id: str, points: list[MetricPoint], *, patience_s: float = 0.0
) -> None:
    """Sends at most 1000 points; those that were sent before are not duplicated.

    Args:
        uri: URI of the tracking server.
        run_id: id of the run.
        points: to send.
        patience_s: seconds after which no new attempt begins.

    Raises:
        RefusedError: MLflow would refuse them again.
        TrackingError: no answer in time.
    """
    from mlflow.entities import Metric

    metrics = [Metric(point.key, point.value, point.timestamp, point.step) for point in points]
    ask(uri, lambda client: client.log_batch(run_id, metrics=metrics), patience_s=patience_s)
