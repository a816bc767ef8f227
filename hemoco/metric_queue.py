"""A queue of metrics that a thread of its own empties: who logs never waits, and an outage loses nothing."""

import dataclasses
import itertools
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_SEND_EVERY_S = 2.0
_LONGEST_PAUSE_S = 60.0
_POINTS_PER_CALL = 1000  # MLflow's limit
_POINTS_KEPT = 200_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970. Sent twice with the same one, it is one point in MLflow."""
    step: int


class MetricQueue:
    """Sends what is logged within seconds. A context manager.

    While sending fails the points are kept, the oldest beyond 200,000 in a local file, and sending is tried again with
    longer and longer pauses. What cannot be delivered by the end goes to the file as well, one point per line.
    """

    def __init__(self, send: Callable[[list[MetricPoint]], None], unsent: Path) -> None:
        """Starts the thread.

        Args:
            send: delivers at most 1000 points, or raises.
            unsent: JSONL file for what cannot be delivered; appended to.
        """
        self._send, self._unsent = send, unsent
        self._points: deque[MetricPoint] = deque()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._end = 0.0
        self._outage = False
        self._thread = threading.Thread(target=self._send_until_closed, name="hemoco-metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the values of one step."""
        now = time.time_ns() // 1_000_000
        points = [MetricPoint(key=k, value=float(v), timestamp=now, step=step) for k, v in metrics.items()]
        with self._lock:
            self._points += points

    def close(self, timeout_s: float = 60.0) -> None:
        """Sends the rest; what is not delivered within the time goes to the file, with a warning that names it."""
        self._end = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        with self._lock:
            rest, self._points = list(self._points), deque()
        self._write(rest)

    def _send_until_closed(self) -> None:
        pause_s = _SEND_EVERY_S
        while not self._closing.wait(pause_s):
            self._send_all()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S) if self._outage else _SEND_EVERY_S
        self._send_all()
        while self._outage and time.monotonic() + 1 < self._end:
            time.sleep(1)
            self._send_all()

    def _send_all(self) -> None:
        while batch := self._next_batch():
            try:
                self._send(batch)
            except Exception as error:  # whatever it is, the metrics must be kept and training must go on
                if not self._outage:
                    logger.warning("event=metrics_outage %s; metrics are kept and sent later", error)
                self._outage = True
                self._spill()
                return
            self._outage = False
            with self._lock:
                for _ in batch[: len(self._points)]:  # none are left where `close` gave up meanwhile
                    self._points.popleft()

    def _next_batch(self) -> list[MetricPoint]:
        with self._lock:
            return list(itertools.islice(self._points, _POINTS_PER_CALL))

    def _spill(self) -> None:
        """Keeps memory bounded in a long outage."""
        with self._lock:
            oldest = [self._points.popleft() for _ in range(len(self._points) - _POINTS_KEPT)]
        self._write(oldest)

    def _write(self, points: list[MetricPoint]) -> None:
        if not points:
            return
        self._unsent.parent.mkdir(parents=True, exist_ok=True)
        with self._unsent.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(point)) + "\n" for point in points)
        logger.warning("event=metrics_unsent points=%d file=%s", len(points), self._unsent)
