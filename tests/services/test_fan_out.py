"""Units in parallel from one driver: each fails and is retried alone; Ctrl-C ends them all."""

import os
import signal
import threading
import time

import pytest
import ray
import torch

from hemoco.config import ResourcesConfig
from hemoco.errors import ConfigError, HemocoError, StorageError, UsageError
from pipeline.transfer.fan_out import in_threads
from pipeline.workers.interruption import TrainingProcess, sigterm_noted
from pipeline.workers.run_lock import only_driver
from pipeline.workers.tasks import CancelledError, Interrupted, LostWorkerError, attempt_tasks
from tests.helpers.waiting import wait_until


def outcomes(function, arguments, stopping=None):
    """Returns the outcomes of calls by their first argument."""
    found = attempt_tasks(
        function, arguments, cpus=1, gpus=0, stopping=stopping or threading.Event()
    )
    return {outcome.arguments[0]: outcome for outcome in found}


def test_failing_unit_leaves_the_others_alone_and_is_not_tried_again(ray_cluster, tmp_path):
    def unit(name, folder):  # here, so that it travels by value: workers do not find the tests
        with (folder / name).open("a") as file:
            file.write("x")
        if name == "bad":
            raise ConfigError("bad: cannot be")
        return name

    found = outcomes(unit, [(name, tmp_path) for name in ("a", "bad", "b")])
    assert {name: outcome.result for name, outcome in found.items()} == {
        "a": "a",
        "bad": None,
        "b": "b",
    }
    assert str(found["bad"].error) == "bad: cannot be"
    assert (tmp_path / "bad").read_text() == "x"


@pytest.mark.parametrize("fault", ["killed", "storage", "interrupted"])
def test_unit_is_tried_again_after_what_may_pass(ray_cluster, tmp_path, fault):
    def unit(name, folder, fault):
        with (folder / name).open("a") as file:
            file.write("x")
        if (folder / name).stat().st_size == 3:
            return "done"
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "storage":
            raise StorageError("s3://b: away")
        return Interrupted("preempted", 7)

    found = outcomes(unit, [("a", tmp_path, fault)])
    assert found["a"].result == "done"


def test_unit_that_is_killed_each_time_is_given_up_with_its_reason(ray_cluster):
    def unit(name):
        os.kill(os.getpid(), signal.SIGKILL)

    assert isinstance(outcomes(unit, [("a",)])["a"].error, LostWorkerError)


def test_bug_in_a_unit_is_an_outcome_too(ray_cluster):
    def unit(name):
        return {}[name]

    assert "KeyError" in str(outcomes(unit, [("a",)])["a"].error)


def test_stopping_cancels_what_runs_and_what_waits(ray_cluster, tmp_path):
    def unit(name, folder):
        (folder / name).touch()
        time.sleep(600)

    stopping, names = threading.Event(), [(str(name), tmp_path) for name in range(9)]
    timer = threading.Thread(
        target=lambda: (wait_until(lambda: list(tmp_path.iterdir()), 120), stopping.set())
    )
    timer.start()
    with pytest.raises(CancelledError):
        outcomes(unit, names, stopping)
    timer.join()
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 120)
    assert len(list(tmp_path.iterdir())) < len(names)


def test_calls_side_by_side_report_only_those_that_failed():
    def fail():
        raise HemocoError("no")

    failed = in_threads({"good": lambda: None, "bad": fail}, at_once=1, stopping=threading.Event())
    assert {name: str(error) for name, error in failed.items()} == {"bad": "no"}


def test_interrupt_sets_stopping_and_waits_for_calls_that_heed_it():
    stopping, ended = threading.Event(), []

    def call():
        os.kill(os.getpid(), signal.SIGINT)
        stopping.wait(60)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        in_threads({"one": call}, at_once=2, stopping=stopping)
    assert ended == [True]


@pytest.mark.parametrize("other", ["on this machine", "on this cluster"])
def test_second_driver_of_a_run_is_refused_while_the_first_is_at_it(
    ray_cluster, tmp_path, monkeypatch, other
):
    with only_driver("twice"):
        if other == "on this cluster":  # from another machine
            monkeypatch.setenv("HEMOCO_HOME", str(tmp_path))
        with (
            pytest.raises(UsageError, match="'twice' is in use by another process"),
            only_driver("twice"),
        ):
            pass
    with only_driver("twice"):
        pass


def test_training_process_that_is_told_to_go_away_says_so_at_the_next_step():
    alone = TrainingProcess(torch.device("cpu"), ResourcesConfig(), [1])
    with sigterm_noted():
        assert alone.interruption(at_checkpoint=True) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert alone.interruption(at_checkpoint=False) == "preempted"
    with sigterm_noted():
        assert alone.interruption(at_checkpoint=False) is None


def test_training_grows_at_the_second_checkpoint_that_sees_room(ray_cluster):
    smaller = TrainingProcess(torch.device("cpu"), ResourcesConfig(workers=2), [1, 2])
    asked = [
        smaller.interruption(at_checkpoint=at_checkpoint) for at_checkpoint in (True, False, True)
    ]
    assert asked == [None, None, "grow"]


def test_training_does_not_grow_to_a_number_of_processes_it_may_not_have(ray_cluster):
    smaller = TrainingProcess(torch.device("cpu"), ResourcesConfig(workers=4), [1, 4])
    assert [smaller.interruption(at_checkpoint=True) for _ in range(3)] == [None] * 3
