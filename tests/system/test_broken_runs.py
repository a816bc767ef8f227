"""Pretrainings whose workers are killed, preempted or lose their core, on real servers."""

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from collections import Counter

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient

from hemoco.backbones.file import load_backbone
from hemoco.config import MoCoConfig, ResourcesConfig, StreamConfig
from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.runs import search
from pipeline.pretrain import BACKBONES
from pipeline.run import pretrain_only
from tests.helpers.expected_batches import fingerprints
from tests.helpers.small_study import INTERVAL, child, losses, pack_digits, small_recipe
from tests.helpers.waiting import wait_until


@pytest.fixture(scope="module")
def recipe(s3, ray_cluster, tracking, tmp_path_factory):
    """A pretraining of 78 short steps: many are left at the second signal, sent after step 20."""
    recipe = small_recipe(pack_digits(s3, tmp_path_factory.mktemp("digits")))
    return dataclasses.replace(
        recipe, pretrain=dataclasses.replace(recipe.pretrain, global_batch_size=64), curve=()
    )


@pytest.fixture(scope="module")
def unbroken(recipe, s3):
    """The pretraining, undisturbed; its losses are what a broken run must repeat."""
    pretrain_only(
        recipe,
        indexes=ShardIndexes(),
        run="untouched",
        storage=join_url(s3, "broken/runs"),
        fresh=False,
        tags={},
    )
    return "untouched"


@pytest.fixture(scope="module")
def broken(unbroken, recipe, s3):
    """The same pretraining with a worker killed and later one preempted; its (step, loss) pairs."""
    storage = join_url(s3, "broken/runs")
    failures: list[BaseException] = []
    thread = threading.Thread(target=_pretrain_in_thread, args=(recipe, storage, failures))
    thread.start()
    checkpoints = join_url(storage, "killed/pretrain/checkpoints")

    def saved(attempt, step):
        return any(
            name.endswith(f"_a{attempt}") and _step_of(name) >= step
            for name in list_names(checkpoints)
        )

    for signum, attempt, step in (
        (signal.SIGKILL, 0, 2 * INTERVAL),
        (signal.SIGTERM, 1, 4 * INTERVAL),
    ):
        wait_until(lambda a=attempt, s=step: failures or saved(a, s), seconds=240)
        assert not failures
        os.kill(_train_workers()[-1], signum)
    thread.join(timeout=300)
    assert not failures
    return losses("killed")


def test_killed_worker_resumes_and_repeats_the_losses_of_the_unbroken_run(unbroken, broken):
    expected = dict(losses(unbroken))
    assert {step for step, _ in broken} == set(expected)
    assert max(abs(value - expected[step]) for step, value in broken) < 1e-6


def test_kill_costs_at_most_the_steps_since_a_checkpoint_and_sigterm_none(unbroken, broken, s3):
    redone = [step for step, count in Counter(step for step, _ in broken).items() if count > 1]
    assert len(redone) <= 2 * INTERVAL
    assert not [step for step in redone if step > 4 * INTERVAL]
    attempts = {
        name[-3:] for name in list_names(join_url(s3, "broken/runs/killed/pretrain/checkpoints"))
    }
    assert "_a2" in attempts, "no third attempt"


def test_final_weights_of_a_run_broken_twice_are_those_of_the_unbroken_one_bit_for_bit(
    unbroken, broken
):
    first, second = (
        load_backbone(child(run, "pretrain").tags["hemoco.backbone_url"])
        for run in (unbroken, "killed")
    )
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(first.state_dict()[name], second.state_dict()[name])
        for name in first.state_dict()
    )


def test_curve_is_measured_while_the_pretraining_goes_on(recipe, s3):
    alone = {
        "epochs": 3,
        "export_every_epochs": 1,
        "resources": ResourcesConfig(workers=1),
        "stream": StreamConfig(workers=0, lanes=8),
    }
    recipe = dataclasses.replace(
        recipe, pretrain=dataclasses.replace(recipe.pretrain, **alone), curve=("knn",)
    )
    storage = join_url(s3, "broken/runs")
    failures: list[BaseException] = []
    thread = threading.Thread(target=_pretrain_in_thread, args=(recipe, storage, failures, "curve"))
    thread.start()
    backbones = join_url(storage, "curve/pretrain", BACKBONES)
    wait_until(lambda: failures or list_names(backbones), seconds=240)
    assert not failures
    # A worker is stopped in the middle of its steps: this network's steps would be over before
    # the first measurement is.
    worker = _train_workers()[-1]
    os.kill(worker, signal.SIGSTOP)
    try:
        wait_until(lambda: failures or _finished_points("curve"), seconds=240)
    finally:
        os.kill(worker, signal.SIGCONT)
    thread.join(timeout=300)
    assert not failures
    client = MlflowClient(tracking_uri())
    ends = [
        client.get_run(
            child("curve", "curve", transfer="knn", epoch=str(epoch)).run_id
        ).info.end_time
        for epoch in (1, 2, 3)
    ]
    assert sorted(ends) == ends
    assert (
        ends[0] < client.get_metric_history(child("curve", "pretrain").run_id, "loss")[-1].timestamp
    )
    curve = client.get_metric_history(child("curve", "pretrain").run_id, "curve/knn/top1")
    assert sorted(point.step for point in curve) == [1, 2, 3]


@pytest.fixture(scope="module")
def elastic(recipe):
    """Four epochs of 20 steps by 2 workers with 2 loader processes each."""
    pretrain = dataclasses.replace(
        recipe.pretrain,
        epochs=4,
        global_batch_size=240,
        moco=MoCoConfig(queue_length=480, bn_group_size=24),
        stream=StreamConfig(workers=2, lanes=12, shards_per_block=2),
    )
    return dataclasses.replace(recipe, pretrain=pretrain)


def test_run_that_lost_a_core_goes_on_with_one_worker_on_the_same_global_batches(
    elastic, s3, caplog
):
    class Idle:  # here, so that it travels by value: workers do not find the tests
        """Holds the core it was given."""

    storage = join_url(s3, "broken/runs")
    failures: list[BaseException] = []
    thread = threading.Thread(
        target=_pretrain_in_thread, args=(elastic, storage, failures, "shrunk")
    )
    thread.start()
    checkpoints = join_url(storage, "shrunk/pretrain/checkpoints")
    wait_until(
        lambda: failures or any(_step_of(name) >= 2 * INTERVAL for name in list_names(checkpoints)),
        seconds=240,
    )
    assert not failures
    usurper = ray.remote(num_cpus=1)(Idle).remote()  # waits for the first core that becomes free
    time.sleep(random.uniform(0, 4))
    os.kill(_train_workers()[-1], signal.SIGKILL)
    thread.join(timeout=400)
    ray.kill(usurper)
    assert not failures
    history = MlflowClient(tracking_uri()).get_metric_history(
        child("shrunk", "pretrain").run_id, "batch_fingerprint"
    )
    expected = fingerprints(elastic.data.shards, elastic.data.pretrain_split, elastic.pretrain)
    assert {(point.step, point.value) for point in history} == set(expected.items())
    assert "event=world_size from=2 to=1" in caplog.text


def _pretrain_in_thread(recipe, storage, failures, run="killed"):
    try:
        pretrain_only(
            recipe, indexes=ShardIndexes(), run=run, storage=storage, fresh=False, tags={}
        )
    except BaseException as error:
        failures.append(error)


def _finished_points(run):
    """MLflow runs of the points of a curve that are measured."""
    uri = tracking_uri()
    wanted = {"hemoco.run": run, "hemoco.phase": "curve"}
    points = search(uri, connect(uri), wanted)
    return [point for point in points if point.status == "FINISHED"]


def _train_workers():
    """Pids of the training processes of this session's Ray, which set their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
    return sorted(found)


def _step_of(checkpoint_name):
    return int(checkpoint_name.split("_")[1])
