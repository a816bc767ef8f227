"""The queue of metrics alone: what it writes to storage, when, and how it is sent later."""

import dataclasses
import logging
import math
from pathlib import Path

import pytest

from hemoco.errors import RefusedError
from hemoco.storage.objects import list_names, write_bytes
from hemoco.tracking import metric_queue
from hemoco.tracking.metric_queue import MetricQueue
from hemoco.tracking.unsent import (
    MetricPoint,
    read_points,
    remove_points,
    unsent_files,
    write_points,
)
from tests.helpers.waiting import within


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(metric_queue, "_SEND_EVERY_S", 0.05)
    monkeypatch.setattr(
        metric_queue, "_RETRIES", dataclasses.replace(metric_queue._RETRIES, first_wait_s=0.1)
    )


class Server:
    """Accepts points, or raises a given error."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0
        self.points: list[MetricPoint] = []

    def __call__(self, points: list[MetricPoint]) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.points += points

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]


def log_steps(queue: MetricQueue, steps: range) -> None:
    for step in steps:
        queue.log(step, {"loss": float(step)})


def kept_steps(folder: str) -> list[int]:
    return [point.step for url in unsent_files(folder) for point in read_points(url)]


def points(steps: range) -> list[MetricPoint]:
    return [
        MetricPoint(key="loss", value=float(step), timestamp=1000 + step, step=step)
        for step in steps
    ]


def test_keep_writes_what_is_not_delivered_to_one_file(bucket):
    queue = MetricQueue(Server(OSError("down")), bucket)
    for start in (0, 10, 20):
        log_steps(queue, range(start, start + 10))
        queue.keep()
    queue.close(timeout_s=0)
    assert kept_steps(bucket) == list(range(30)) and len(unsent_files(bucket)) == 1


def test_what_was_kept_is_removed_once_it_is_delivered(bucket):
    server = Server(OSError("down"))
    with MetricQueue(server, bucket) as queue:
        log_steps(queue, range(10))
        queue.keep()
        assert kept_steps(bucket) == list(range(10))
        server.error = None
        assert within(20, lambda: not unsent_files(bucket))
    assert server.steps == list(range(10))


def test_nothing_is_kept_where_all_is_delivered(tmp_path):
    server = Server()
    with MetricQueue(server, str(tmp_path)) as queue:
        log_steps(queue, range(10))
        assert within(20, lambda: queue.delivered)
        queue.keep()
        assert unsent_files(str(tmp_path)) == []


def test_what_a_killed_attempt_left_is_delivered_first_with_its_timestamps(bucket):
    write_points(bucket, points(range(1500)))
    write_points(bucket, points(range(1500, 1600)))
    server = Server()
    with MetricQueue(server, bucket) as queue:
        queue.log(9999, {"loss": 0.0})
    assert server.points[:-1] == points(range(1600)) and server.steps[-1] == 9999
    assert unsent_files(bucket) == []


def test_an_outage_costs_no_point_and_repeats_none(tmp_path, caplog):
    server = Server(OSError("down"))
    with MetricQueue(server, str(tmp_path)) as queue:
        log_steps(queue, range(1500))
        assert within(20, lambda: server.calls > 0)
        log_steps(queue, range(1500, 3000))
        server.error = None
    assert server.steps == list(range(3000))
    assert caplog.text.count("event=metrics_outage ") == 1


def test_a_long_outage_moves_the_older_points_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_queue, "_POINTS_IN_MEMORY", 5_000)
    server = Server(OSError("down"))
    queue = MetricQueue(server, str(tmp_path))
    for start in (0, 6_000, 12_000):
        log_steps(queue, range(start, start + 6_000))
        calls = server.calls
        assert within(60, lambda calls=calls: server.calls > calls)
    assert within(20, lambda: len(queue._points) <= 5_000)
    queue.keep()
    assert sorted(kept_steps(str(tmp_path))) == list(range(18_000))
    server.error = None
    queue.close()
    assert sorted(server.steps) == list(range(18_000)) and unsent_files(str(tmp_path)) == []


def test_what_cannot_be_delivered_at_the_end_is_kept_and_the_command_named(tmp_path, caplog):
    queue = MetricQueue(Server(OSError("down")), str(tmp_path))
    log_steps(queue, range(10))
    queue.close(timeout_s=1)
    assert kept_steps(str(tmp_path)) == list(range(10)) and not queue.delivered
    assert (
        "points=10" in caplog.text
        and "python -m jobs sync RUN" in caplog.text
        and str(tmp_path) in caplog.text
    )


def test_a_refusal_is_said_once_and_never_tried_again(tmp_path, caplog):
    server = Server(RefusedError("the run was deleted"))
    queue = MetricQueue(server, str(tmp_path))
    log_steps(queue, range(10))
    assert within(20, lambda: server.calls == 1)
    log_steps(queue, range(10, 3000))
    queue.close()
    assert server.calls == 1 and caplog.text.count("the run was deleted") == 1
    assert kept_steps(str(tmp_path)) == list(range(3000))


def test_trouble_with_the_storage_is_warned_of_once_and_not_raised(s3, caplog):
    server = Server()
    with MetricQueue(server, "s3://no-such-bucket/unsent") as queue:
        for start in (0, 10):
            log_steps(queue, range(start, start + 10))
            queue.keep()
    assert server.steps == list(range(20))
    assert (
        caplog.text.count("event=metrics_storage") == 1
        and "'no-such-bucket' does not exist" in caplog.text
    )


def test_points_that_neither_side_took_are_counted_as_lost(s3, caplog):
    queue = MetricQueue(Server(OSError("down")), "s3://no-such-bucket/unsent")
    log_steps(queue, range(10))
    queue.close(timeout_s=1)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "event=metrics_lost points=10" in record.getMessage()


def test_one_queue_may_deliver_what_another_that_lives_has_kept(tmp_path):
    first = Server(OSError("down"))
    mine = MetricQueue(first, str(tmp_path))
    log_steps(mine, range(10))
    mine.keep()
    with MetricQueue(Server(), str(tmp_path)):
        log_steps(mine, range(10, 20))
        mine.keep()
    assert kept_steps(str(tmp_path))[-20:] == list(range(20))
    first.error = None
    mine.close()
    assert first.steps == list(range(20)) and unsent_files(str(tmp_path)) == []


def test_a_file_that_was_delivered_by_another_is_no_trouble(bucket, caplog):
    server = Server(OSError("down"))
    queue = MetricQueue(server, bucket)
    log_steps(queue, range(10))
    queue.keep()
    with MetricQueue(Server(), bucket):
        pass
    assert unsent_files(bucket) == []
    server.error = None
    queue.close()
    assert server.steps == list(range(10)) and "metrics_storage" not in caplog.text


def test_a_damaged_file_is_named_and_left(tmp_path, caplog):
    write_bytes(f"{tmp_path}/0_damaged.jsonl", b'{"key": "loss"')
    write_points(str(tmp_path), points(range(10)))
    server = Server()
    with MetricQueue(server, str(tmp_path)):
        pass
    assert server.steps == list(range(10)) and list_names(str(tmp_path)) == ["0_damaged.jsonl"]
    assert "0_damaged.jsonl: not a file of kept metrics" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-300, 0.1])
def test_every_float_is_kept_exactly(tmp_path: Path, value: float):
    url = write_points(str(tmp_path), [MetricPoint(key="a/b c", value=value, timestamp=1, step=2)])
    (read,) = read_points(url)
    assert repr(read.value) == repr(value) and (read.key, read.timestamp, read.step) == (
        "a/b c",
        1,
        2,
    )


def test_a_file_that_is_gone_holds_nothing_and_needs_no_removal(bucket):
    gone = write_points(bucket, points(range(10)))
    for _ in range(2):
        remove_points(gone)
        assert read_points(gone) == []
