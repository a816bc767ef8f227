"""Faults of a real MLflow server: every point arrives once, and training never waits for it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster.local.servers import MlflowServer, mlflow_server
from hemoco.errors import TrackingError
from hemoco.storage.objects import join_url
from hemoco.tracking.client import connect
from hemoco.tracking.metric_queue import Tracker
from hemoco.tracking.runs import open_run
from hemoco.tracking.unsent import FOLDER, unsent_files
from jobs.cli import main
from tests.helpers.mlflow_proxy import MlflowProxy, mlflow_proxy
from tests.helpers.waiting import within

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ROOT = Path(__file__).parents[2]
# an attempt that logs and keeps, as before a checkpoint, and is killed in the next steps
ATTEMPT = """
import os, signal, sys
from hemoco.tracking.metric_queue import Tracker
tracker = Tracker(*sys.argv[1:])
for step in range(1500):
    tracker.log(step, {"loss": float(step)})
tracker.keep()
tracker.log(1500, {"loss": 1500.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


class Lab:
    """An MLflow server that can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self._stack = contextlib.ExitStack()
        self.server: MlflowServer

    def start(self) -> None:
        self.server = self._stack.enter_context(mlflow_server(self.folder, port=self.port))
        self.port = int(self.server.uri.rpartition(":")[2])

    def kill(self) -> None:
        """Ends all processes of the server at once, with SIGKILL."""
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self._stack.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("server")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments(max_results=1)
    lab = Lab(folder)
    lab.start()
    yield lab
    lab.kill()


@pytest.fixture
def proxy(lab: Lab) -> Iterator[MlflowProxy]:
    with mlflow_proxy(lab.server.uri) as proxy:
        yield proxy


@pytest.fixture
def run_id(lab: Lab, request: pytest.FixtureRequest, bucket: str) -> str:
    """MLflow's id of a child run; its run has the name of the test."""
    uri, name = lab.server.uri, request.node.name
    tags = {"hemoco.run": name, "hemoco.phase": "parent", "hemoco.storage": bucket}
    parent = open_run(uri, connect(uri), name=name, parent=None, tags=tags, params={})
    tags = {"hemoco.run": name, "hemoco.phase": "pretrain"}
    return open_run(uri, connect(uri), name="pretrain", parent=parent, tags=tags, params={})


@pytest.fixture
def unsent(bucket: str, run_id: str) -> str:
    return join_url(bucket, "pretrain", FOLDER, run_id)


def log_steps(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"loss": float(step)})


def arrived(lab: Lab, run_id: str) -> list[tuple[int, float]]:
    """Returns every point that MLflow has, with duplicates."""
    history = MlflowClient(lab.server.uri).get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in history)


def each_once(count: int) -> list[tuple[int, float]]:
    return [(step, float(step)) for step in range(count)]


def kept_in_an_outage(proxy: MlflowProxy, run_id: str, unsent: str, count: int) -> None:
    """Leaves points in storage, as a training does that ends during an outage."""
    proxy.mode = "down"
    tracker = Tracker(proxy.uri, run_id, unsent)
    log_steps(tracker, range(count))
    tracker.close(timeout_s=0)
    assert unsent_files(unsent)


def test_a_server_that_answers_500_gets_every_point_once_later(lab, proxy, run_id, unsent):
    with Tracker(proxy.uri, run_id, unsent) as tracker:
        proxy.mode = "error"
        log_steps(tracker, range(1500))
        assert within(30, lambda: "error" in proxy.requests)
        tracker.keep()
        proxy.mode = "pass"
    assert arrived(lab, run_id) == each_once(1500) and unsent_files(unsent) == []


def test_a_server_whose_answers_are_lost_has_every_point_once(lab, proxy, run_id, unsent):
    with Tracker(proxy.uri, run_id, unsent) as tracker:
        proxy.mode = "lose"
        log_steps(tracker, range(1500))
        assert within(
            60,
            lambda: proxy.requests.count("lose") >= 2 and arrived(lab, run_id) == each_once(1000),
        )
        proxy.mode = "pass"
    assert arrived(lab, run_id) == each_once(1500)


def test_training_logs_keeps_and_goes_on_while_a_slow_server_has_answered_nothing(
    lab, proxy, run_id, unsent
):
    with Tracker(proxy.uri, run_id, unsent) as tracker:
        proxy.mode = "hold"
        log_steps(tracker, range(1000))
        assert within(30, lambda: proxy.requests == ["hold"])
        log_steps(tracker, range(1000, 3000))
        tracker.keep()
        assert arrived(lab, run_id) == [] and proxy.requests == ["hold"]
        assert len(unsent_files(unsent)) == 1
        proxy.mode = "pass"
        proxy.go_on.set()
    assert arrived(lab, run_id) == each_once(3000) and unsent_files(unsent) == []


def test_what_an_attempt_kept_before_it_was_killed_is_delivered_by_the_next(
    lab, proxy, run_id, unsent
):
    proxy.mode = "down"
    words = [sys.executable, "-c", ATTEMPT, proxy.uri, run_id, unsent]
    assert subprocess.run(words, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert arrived(lab, run_id) == []
    proxy.mode = "pass"
    with Tracker(proxy.uri, run_id, unsent) as tracker:  # resumed from the checkpoint at step 1500
        log_steps(tracker, range(1500, 2000))
    assert arrived(lab, run_id) == each_once(2000) and unsent_files(unsent) == []


def test_a_deleted_run_is_asked_once_and_its_points_are_delivered_after_it_is_restored(
    lab, proxy, run_id, unsent, caplog, capsys, monkeypatch, request
):
    client = MlflowClient(lab.server.uri)
    client.delete_run(run_id)
    with Tracker(proxy.uri, run_id, unsent) as tracker:
        log_steps(tracker, range(1500))
        assert within(30, lambda: "event=metrics_refused" in caplog.text)
        log_steps(tracker, range(1500, 2000))
    assert len(proxy.requests) == 1 and caplog.text.count("mlflow runs restore") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.server.uri)
    assert main(["sync", request.node.name]) == 1
    assert "mlflow runs restore" in capsys.readouterr().err
    client.restore_run(run_id)
    assert main(["sync", request.node.name]) == 0
    assert arrived(lab, run_id) == each_once(2000)


def test_sync_delivers_all_says_how_many_and_then_has_nothing_to_do(
    lab, proxy, run_id, unsent, capsys, monkeypatch, request
):
    kept_in_an_outage(proxy, run_id, unsent, 1500)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.server.uri)
    assert main(["sync", request.node.name]) == 0
    assert capsys.readouterr().out == "pretrain: 1500 points delivered\n"
    assert arrived(lab, run_id) == each_once(1500) and unsent_files(unsent) == []
    assert main(["sync", request.node.name]) == 0
    assert "nothing to deliver" in capsys.readouterr().out


def test_sync_finds_units_one_level_deeper(
    lab, proxy, run_id, bucket, capsys, monkeypatch, request
):
    for unit in ("pretrained_seed_0", "random_seed_0"):
        kept_in_an_outage(proxy, run_id, join_url(bucket, "probe", unit, FOLDER, run_id), 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.server.uri)
    assert main(["sync", request.node.name]) == 0
    assert capsys.readouterr().out == "pretrain: 20 points delivered\n"


def test_sync_of_a_run_that_mlflow_does_not_know_is_wrong_usage(lab, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.server.uri)
    assert main(["sync", "no_such_run"]) == 2
    assert "MLflow knows no run 'no_such_run'" in capsys.readouterr().err


# the last ones: they kill the server of this module
def test_a_server_killed_in_mid_run_has_every_point_once_after_its_restart(
    lab, run_id, unsent, caplog
):
    with Tracker(lab.server.uri, run_id, unsent) as tracker:
        log_steps(tracker, range(1500))
        assert within(30, lambda: arrived(lab, run_id) == each_once(1500))
        lab.kill()
        log_steps(tracker, range(1500, 3000))
        assert within(30, lambda: "event=metrics_outage " in caplog.text)
        tracker.keep()
        log_steps(tracker, range(3000, 3500))
        lab.start()
    assert arrived(lab, run_id) == each_once(3500) and unsent_files(unsent) == []


def test_sync_and_connect_say_in_one_line_that_no_server_answers_and_lose_nothing(
    lab, proxy, run_id, unsent, capsys, monkeypatch, request
):
    kept_in_an_outage(proxy, run_id, unsent, 10)
    lab.kill()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", lab.server.uri)
    before = unsent_files(unsent)
    assert main(["sync", request.node.name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"MLflow at {lab.server.uri}: it does not answer; start the server" in line
    assert unsent_files(unsent) == before
    with pytest.raises(TrackingError, match="does not answer"):
        connect(lab.server.uri)
