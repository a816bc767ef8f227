"""MLflow as runs use it: real SQLite stores, several writers, outages."""

import json
import math
import multiprocessing
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from hemoco.errors import RefusedError, TrackingError, UsageError
from hemoco.tracking import client
from hemoco.tracking import runs as door
from hemoco.tracking.client import connect
from hemoco.tracking.metric_queue import Tracker, send_points
from hemoco.tracking.runs import close_run, find_run, metric_history, open_run, run_facts, search
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint, read_points, unsent_files

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def uri(schema: Path, tmp_path: Path) -> str:
    shutil.copy(schema, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def run_id(uri: str) -> str:
    return open_run(uri, connect(uri), name="a", parent=None, tags={"hemoco.run": "a"}, params={})


@pytest.fixture
def unsent(tmp_path: Path) -> str:
    return str(tmp_path / "unsent")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMOCO_HOME", str(tmp_path / "home"))


def test_without_a_server_runs_are_kept_in_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert client.tracking_uri() == f"sqlite:///{tmp_path}/home/mlflow.db"


def test_relative_sqlite_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///here.db")
    assert client.tracking_uri() == f"sqlite:///{tmp_path}/here.db"


def test_connecting_twice_finds_the_same_experiment(uri: str, tmp_path: Path) -> None:
    first = connect(uri)
    assert connect(uri) == first
    assert (
        MlflowClient(uri).get_experiment(first).artifact_location
        == f"file://{tmp_path}/mlartifacts"
    )


@pytest.mark.parametrize(
    "wrong", ["ftp://host/x", "/some/folder", "file:///some/folder", "mlflow.db"]
)
def test_wrong_kind_of_uri_says_what_to_use(wrong: str) -> None:
    with pytest.raises(TrackingError, match="use http"):
        connect(wrong)


def test_unreachable_server_is_one_line_within_seconds() -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        connect("http://someone:secret@127.0.0.1:9")
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith(
        "MLflow at http://127.0.0.1:9: it does not answer; start the server"
    )
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("not a database" * 100)
    with pytest.raises(TrackingError, match=r"notes\.db: file is not a database"):
        connect(f"sqlite:///{tmp_path}/notes.db")


def test_mlflow_shows_the_experiment_as_model_training(uri: str) -> None:
    connect(uri)
    client = MlflowClient(uri)
    made = client.get_experiment_by_name("hemoco")
    assert made.tags["mlflow.experimentKind"] == "custom_model_development"
    client.delete_experiment_tag(
        made.experiment_id, "mlflow.experimentKind"
    )  # as one of an older version
    connect(uri)
    assert (
        client.get_experiment_by_name("hemoco").tags["mlflow.experimentKind"]
        == "custom_model_development"
    )


def test_deleted_experiment_says_how_to_restore_it(uri: str) -> None:
    MlflowClient(uri).delete_experiment(connect(uri))
    with pytest.raises(TrackingError, match="mlflow experiments restore --experiment-id"):
        connect(uri)


def test_run_is_found_by_its_tags_with_all_its_params(uri: str) -> None:
    experiment = connect(uri)
    params = {f"data.p{i}": str(i) for i in range(205)} | {"data.shards": ""}
    parent = open_run(
        uri, experiment, name="it's", parent=None, tags={"hemoco.run": "it's"}, params=params
    )
    tags = {"hemoco.run": "it's", "hemoco.phase": "pretrain"}
    child = open_run(uri, experiment, name="pretrain", parent=parent, tags=tags, params={})
    found = find_run(uri, experiment, tags)
    assert found.run_id == child and found.status == "RUNNING"
    assert found.tags["mlflow.parentRunId"] == parent
    assert run_facts(uri, parent).params == params


def test_the_newest_of_several_runs_is_found(uri: str) -> None:
    experiment = connect(uri)
    ids = []
    for _ in range(2):
        ids.append(
            open_run(uri, experiment, name="a", parent=None, tags={"hemoco.run": "a"}, params={})
        )
        time.sleep(0.002)  # MLflow orders by milliseconds
    assert find_run(uri, experiment, {"hemoco.run": "a"}).run_id == ids[-1]
    assert find_run(uri, experiment, {"hemoco.run": "b"}) is None


def test_search_takes_excluded_values_a_prefix_and_a_limit(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = connect(uri)
    for name, phase in (
        ("s/t_1", "a"),
        ("s/t_2", "b"),
        ("s/t_3", "c"),
        ("S/T_4", "a"),
        ("s/tx5", "a"),
    ):
        tags = {Tag.RUN: name, Tag.PHASE: phase}
        open_run(uri, experiment, name=name, parent=None, tags=tags, params={})
        time.sleep(0.002)  # MLflow orders by milliseconds

    def names(**conditions: Any) -> list[str]:
        return [facts.tags[Tag.RUN] for facts in search(uri, experiment, {}, **conditions)]

    assert names(prefix={Tag.RUN: "s/t_"}) == [
        "s/t_3",
        "s/t_2",
        "s/t_1",
    ]  # not LIKE's _ nor its capitals
    assert names(exclude={Tag.PHASE: ("a", "c")}) == ["s/t_2"]
    monkeypatch.setattr(door, "_PAGE", 2)
    assert names(prefix={Tag.RUN: "s/t"}) == ["s/tx5", "s/t_3", "s/t_2", "s/t_1"]
    assert names(prefix={Tag.RUN: "s/t_"}, limit=1) == ["s/t_3"]
    assert len(names()) == 5 and len(names(limit=3)) == 3


def test_search_has_times_and_steps_of_metrics(uri: str) -> None:
    experiment = connect(uri)
    run_id = open_run(uri, experiment, name="a", parent=None, tags={Tag.RUN: "a"}, params={})
    send_points(uri, run_id, [MetricPoint(key="loss", value=1.0, timestamp=5000, step=7)])
    close_run(uri, run_id, "FINISHED")
    (facts,) = search(uri, experiment, {Tag.RUN: "a"}, patience_s=0.0)
    info = MlflowClient(uri).get_run(run_id).info
    assert (facts.steps, facts.measured_s) == ({"loss": 7}, 5.0)
    assert (facts.started_s, facts.ended_s) == (info.start_time / 1000, info.end_time / 1000)


def test_name_that_cannot_be_searched_for_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="must not contain"):
        find_run(uri, connect(uri), {"hemoco.run": 'a" or "'})


def test_reopened_run_forgets_why_it_failed(uri: str, run_id: str) -> None:
    door.set_tags(uri, run_id, {"hemoco.error": "out of memory", "hemoco.kept": "yes"})
    close_run(uri, run_id, "FAILED")
    assert run_facts(uri, run_id).status == "FAILED"
    door.reopen_run(uri, run_id)
    facts = run_facts(uri, run_id)
    assert (
        facts.status == "RUNNING"
        and "hemoco.error" not in facts.tags
        and facts.tags["hemoco.kept"] == "yes"
    )


def test_unknown_run_is_an_error_at_once(uri: str, run_id: str) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match="not found"):
        run_facts(uri, "0" * 32)
    assert time.monotonic() - began < 5


def test_artifacts_come_back(uri: str, run_id: str) -> None:
    door.log_artifact_bytes(uri, run_id, "a.png", b"\x89PNG")
    door.log_artifact_bytes(uri, run_id, "notes.txt", b"text")
    assert door.read_artifacts(uri, run_id, ".png") == {"a.png": b"\x89PNG"}


def test_dataset_is_recorded_once_however_often_it_is_logged(uri: str, run_id: str) -> None:
    for _ in range(2):
        door.log_dataset_input(uri, run_id, "cells", "s3://bucket/cells", "d" * 64, "pretraining")
    (entry,) = MlflowClient(uri).get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("cells", "d" * 36)
    assert json.loads(entry.dataset.source) == {"uri": "s3://bucket/cells"}
    assert entry.tags[0].value == "pretraining"


def test_all_logged_metrics_arrive_in_order(uri: str, run_id: str, unsent: str) -> None:
    with Tracker(uri, run_id, unsent) as tracker:
        for step in range(1500):
            tracker.log(step, {"loss": step / 2, "lr": 0.1})
    assert metric_history(uri, run_id, "loss") == [(step, step / 2) for step in range(1500)]
    assert run_facts(uri, run_id).metrics == {"loss": 749.5, "lr": 0.1}


def test_repeated_steps_of_a_resumed_training_count_once(
    uri: str, run_id: str, unsent: str
) -> None:
    for attempt in (1.0, 2.0):
        with Tracker(uri, run_id, unsent) as tracker:
            tracker.log(10, {"loss": attempt})
        time.sleep(0.002)
    assert metric_history(uri, run_id, "loss") == [(10, 2.0)]


def test_what_a_server_that_never_answers_misses_is_kept(
    unsent: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker("http://someone:secret@127.0.0.1:9", "r1", unsent)
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    tracker.close(timeout_s=3)
    (url,) = unsent_files(unsent)
    assert [(p.key, p.value, p.step) for p in read_points(url)] == [
        ("loss", 1.0, step) for step in range(1000)
    ]
    assert "python -m jobs sync RUN" in caplog.text and "secret" not in caplog.text


def test_metrics_survive_a_locked_database(
    uri: str, run_id: str, unsent: str, tmp_path: Path
) -> None:
    lock = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    lock.execute("begin exclusive")
    threading.Timer(7, lambda: lock.execute("rollback")).start()  # SQLite itself waits 5 s
    with Tracker(uri, run_id, unsent) as tracker:
        tracker.log(1, {"loss": 3.0})
    lock.close()
    assert metric_history(uri, run_id, "loss") == [(1, 3.0)]
    assert unsent_files(unsent) == []


def test_points_that_are_sent_twice_are_one_in_mlflow(uri: str, run_id: str) -> None:
    points = [
        MetricPoint(key="loss", value=v, timestamp=5, step=7) for v in (0.1, math.nan, math.inf)
    ]
    for _ in range(2):
        send_points(uri, run_id, points)
    assert len(MlflowClient(uri).get_metric_history(run_id, "loss")) == 3


def test_a_deleted_run_refuses_for_good_and_says_how_to_restore_it(uri: str, run_id: str) -> None:
    MlflowClient(uri).delete_run(run_id)
    with pytest.raises(RefusedError, match="mlflow runs restore"):
        send_points(uri, run_id, [MetricPoint(key="loss", value=1.0, timestamp=5, step=7)])


def write_run(uri: str, name: str, unsent: str) -> None:
    run_id = open_run(
        uri, connect(uri), name=name, parent=None, tags={"hemoco.run": name}, params={"a": "b"}
    )
    with Tracker(uri, run_id, unsent) as tracker:
        for step in range(300):
            tracker.log(step, {"loss": float(step)})
    close_run(uri, run_id, "FINISHED")


def test_several_processes_write_to_one_sqlite(uri: str, unsent: str) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=write_run, args=(uri, f"run{i}", f"{unsent}/{i}")) for i in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    experiment = connect(uri)
    runs = [find_run(uri, experiment, {"hemoco.run": f"run{i}"}) for i in range(3)]
    assert [run.status for run in runs] == ["FINISHED"] * 3
    assert [len(metric_history(uri, run.run_id, "loss")) for run in runs] == [300] * 3
