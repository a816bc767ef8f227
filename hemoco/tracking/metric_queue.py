"""A queue of metrics that a thread of its own empties: who logs never waits, no outage and no kill loses a point.

Where a point is: in memory until it is delivered; from `keep` on also in a file below `unsent`; in a file alone where
a killed attempt left it, or where a long outage moved it out of memory.
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
    kept_files,
    read_points,
    remove_points,
    write_points,
)

logger = logging.getLogger(__name__)

_SEND_EVERY_S = 2.0
_CLOSE_S, _CLOSE_AFTER_ERROR_S = 60.0, 10.0
_POINTS_IN_MEMORY = 50_000
_STORAGE_PAUSE_S = 60.0


def _any_exception(error: BaseException) -> bool:
    return isinstance(error, Exception)


_RETRIES = RetryPolicy(is_transient=_any_exception, first_wait_s=4.0, longest_wait_s=60.0)
_RETRIES_AT_CLOSE = RetryPolicy(is_transient=_any_exception, first_wait_s=1.0, longest_wait_s=2.0)


class MetricQueue:
    """Sends what is logged within seconds. A context manager.

    While sending fails it is tried again with longer and longer pauses. Several queues, also of several processes, may
    share one folder `unsent`: what one of them delivers twice is one point in MLflow.
    """

    def __init__(self, send: Callable[[list[MetricPoint]], None], unsent: str) -> None:
        """Starts the thread, which first delivers what a killed attempt left below `unsent`.

        Args:
            send: delivers at most 1000 points, or raises; RefusedError where it would raise for ever.
            unsent: URL of a folder for this run's undelivered points.
        """
        self._send, self._unsent = send, unsent
        self._points: deque[MetricPoint] = deque()
        self._gone = 0  # points that have left memory, from the first on
        self._kept, self._kept_until = "", 0  # the file that holds points of memory, up to that one
        self._superfluous: list[str] = []  # files whose points are delivered, or in another file
        self._files: deque[str] = deque()  # whose points are not in memory
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._end = float("inf")
        self._outage = self._refused = self._storage_warned = False
        self._move_again = 0.0
        try:
            self._files += kept_files(unsent)
        except StorageError as error:
            self._warn_of_storage(error)
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
        """Whether all that was logged, and all that killed attempts left, has arrived."""
        return not self._points and not self._files

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the values of one step."""
        now = time.time_ns() // 1_000_000
        points = [
            MetricPoint(key=k, value=float(v), timestamp=now, step=step) for k, v in metrics.items()
        ]
        with self._lock:
            self._points += points

    def keep(self) -> None:
        """Writes what is not delivered yet to a file below `unsent`. To be called before a checkpoint is written.

        Who resumes from that checkpoint does not log those steps again. MLflow is not waited for, not even for a
        moment: one small write costs less. Trouble with the storage is warned of, once, and not raised.
        """
        with self._lock:
            points, until = list(self._points), self._gone + len(self._points)
        if not points or until == self._kept_until:
            return
        written = self._write(points)
        if written:
            with self._lock:
                self._superfluous.append(self._kept)
                self._kept, self._kept_until = written, until

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Sends the rest; what is not delivered within the time stays below `unsent`, with a warning that says so."""
        if self._outage:
            self.keep()  # this process may be killed while it waits
        self._end = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        self.keep()
        self._remove_superfluous()
        with self._lock:
            left, safe = len(self._points), max(0, self._kept_until - self._gone)
        if not self.delivered:
            logger.warning(
                "event=metrics_unsent points=%d older_files=%d folder=%s; once MLflow answers: "
                "python -m jobs sync RUN (RUN: the name of the run), or resume the run",
                *(safe, len(self._files), self._unsent),
            )
        if left > safe:
            logger.error(
                "event=metrics_lost points=%d; neither MLflow nor %s took them",
                left - safe,
                self._unsent,
            )

    def _deliver_until_closed(self) -> None:
        closing = self._closing
        patient = retrying(_RETRIES).copy(
            sleep=sleep_using_event(closing), stop=stop_when_event_set(closing)
        )
        while not closing.wait(_SEND_EVERY_S):
            with contextlib.suppress(Exception):  # logged by `_deliver`
                patient(self._deliver)
        left_s = max(0.0, self._end - time.monotonic())
        with contextlib.suppress(Exception):
            retrying(dataclasses.replace(_RETRIES_AT_CLOSE, budget_s=left_s))(self._deliver)

    def _deliver(self) -> None:
        """Sends all that there is; whatever fails is logged, and raised where another attempt may succeed."""
        try:
            if not self._refused:
                self._deliver_files()
                self._deliver_memory()
        except RefusedError as error:
            self._refused = self._outage = True
            logger.error(
                "event=metrics_refused %s; not tried again, metrics are kept in %s",
                error,
                self._unsent,
            )
        except (
            Exception
        ) as error:  # whatever it is, the metrics must be kept and training must go on
            if not self._outage:
                logger.warning("event=metrics_outage %s; metrics are kept and sent later", error)
            self._outage = True
            raise
        finally:
            self._bound_memory()
            self._remove_superfluous()

    def _deliver_files(self) -> None:
        while self._files and time.monotonic() < self._end:
            try:
                points = read_points(self._files[0])
            except StorageError as error:
                self._warn_of_storage(error)
                return
            except TrackingError as error:
                logger.warning("event=metrics_damaged %s", error)
                points = []
            else:
                for start in range(0, len(points), POINTS_PER_CALL):
                    self._send_batch(points[start : start + POINTS_PER_CALL])
                self._remove(self._files[0])
            self._files.popleft()
            self._bound_memory()

    def _deliver_memory(self) -> None:
        while (batch := self._oldest(POINTS_PER_CALL)) and time.monotonic() < self._end:
            self._send_batch(batch)
            self._forget(len(batch))
            self._bound_memory()

    def _send_batch(self, batch: list[MetricPoint]) -> None:
        self._send(batch)
        if self._outage:
            logger.warning("event=metrics_outage_over")
        self._outage = False

    def _bound_memory(self) -> None:
        """Moves the older half to a file where a long outage filled the memory."""
        if len(self._points) <= _POINTS_IN_MEMORY or time.monotonic() < self._move_again:
            return
        oldest = self._oldest(len(self._points) - _POINTS_IN_MEMORY // 2)
        written = self._write(oldest)
        if written:
            self._files.append(written)
            self._forget(len(oldest))
        else:
            self._move_again = (
                time.monotonic() + _STORAGE_PAUSE_S
            )  # delivery must not wait for the storage each time

    def _oldest(self, count: int) -> list[MetricPoint]:
        with self._lock:
            return list(itertools.islice(self._points, count))

    def _forget(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                self._points.popleft()
            self._gone += count

    def _remove_superfluous(self) -> None:
        with self._lock:
            if self._gone >= self._kept_until:
                self._superfluous.append(self._kept)
                self._kept = ""
            superfluous, self._superfluous = self._superfluous, []
        for url in filter(None, superfluous):
            self._remove(url)

    def _write(self, points: list[MetricPoint]) -> str:
        """The file's URL, empty where the storage did not take it."""
        try:
            return write_points(self._unsent, points)
        except (
            Exception
        ) as error:  # training goes on without; the checkpoint that follows has its own say
            self._warn_of_storage(error)
            return ""

    def _remove(self, url: str) -> None:
        try:
            remove_points(url)
        except Exception as error:  # delivered again later, which changes nothing in MLflow
            self._warn_of_storage(error)

    def _warn_of_storage(self, error: Exception) -> None:
        if not self._storage_warned:
            logger.warning(
                "event=metrics_storage %s; until it answers, undelivered metrics are in memory alone",
                error,
            )
        self._storage_warned = True


class Tracker(MetricQueue):
    """Metrics of one MLflow run, sent while training goes on.

    Args:
        uri: of MLflow.
        run_id: the run.
        unsent: URL of a folder for points that are not delivered yet, `JOB/unsent_metrics/RUN_ID`: there a resumed
            training and `python -m jobs sync` find them.
    """

    def __init__(self, uri: str, run_id: str, unsent: str) -> None:
        client_type()  # here, because two threads must not import mlflow at the same time
        self.step: int | None = None
        """The last one that was logged; None before."""
        super().__init__(partial(send_points, uri, run_id), unsent)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """As of MetricQueue."""
        self.step = step
        super().log(step, metrics)


def check_delivered(tracker: Tracker) -> None:
    """Refuses to call work done whose metrics MLflow does not have, for a comparison reads nothing else.

    Args:
        tracker: closed.

    Raises:
        TrackingError: it still has some.
    """
    if not tracker.delivered:
        raise TrackingError(
            "MLflow has not taken all metrics, which are kept beside the checkpoints: when it answers again, say the "
            "same words, and the work goes on from its last checkpoint"
        )


def send_points(
    uri: str, run_id: str, points: list[MetricPoint], *, patience_s: float = 0.0
) -> None:
    """Sends at most 1000 points, however often they were sent before.

    Raises:
        RefusedError: MLflow would refuse them for ever.
        TrackingError: no answer in time.
    """
    from mlflow.entities import Metric

    metrics = [Metric(point.key, point.value, point.timestamp, point.step) for point in points]
    ask(uri, lambda client: client.log_batch(run_id, metrics=metrics), patience_s=patience_s)
