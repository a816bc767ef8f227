"""Pretraining, transfers and their record on a real Ray, a real S3 server and a real MLflow."""

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
import torch
from expected_batches import fingerprints
from mlflow import MlflowClient
from waiting import wait_until

from cluster.processes import _descendants
from hemoco.checkpoint import load_backbone, save_checkpoint
from hemoco.comparison import comparison
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.errors import HemocoError, TrainingError, UsageError
from hemoco.storage import join_url, list_names, read_bytes, write_bytes
from hemoco.tracking import connect, find_run, tracking_uri
from hemoco.train import build_state
from jobs.digits import write_digits
from pipeline.graph import pretrain_only, pretrain_then_transfer, transfer_only
from pipeline.pack import pack
from pipeline.pretrain import _naming_checkpoint
from pipeline.study import check_pretraining

INTERVAL = 5


@pytest.fixture(scope="module")
def recipe(s3, ray_cluster, tracking, tmp_path_factory):
    """Digits on S3 and a pretraining of 2 workers in which a step takes a good part of a second."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 0)
    url = join_url(s3, "pipeline/digits")
    pack((str(folder),), url, split="train", samples_per_shard=500, seed=0)
    return small_recipe(url)


def small_recipe(shards):
    pretrain = PretrainConfig(
        epochs=1,
        global_batch_size=128,
        log_every_steps=1,
        checkpoint_every_steps=INTERVAL,
        knn_every_epochs=0,
        export_every_epochs=1,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(architecture="resnet10t"),
        moco=MoCoConfig(queue_length=512, bn_group_size=16),
        optimizer=OptimizerConfig(lr=0.05),
        stream=StreamConfig(workers=1, lanes=8),
        resources=ResourcesConfig(workers=2),
    )
    trained = {
        "epochs": 1,
        "global_batch_size": 64,
        "size": 32,
        "resize": 32,
        "stream": StreamConfig(workers=0, lanes=8),
    }
    transfers = {
        "knn": KnnConfig(neighbours=20),
        "linear_probe": LinearProbeConfig(epochs=5),
        "low_shot": LowShotConfig(draws=2),
        "linear": LinearClassifierConfig(lr=1.0, inits=("random",), **trained),
        "fine_tune": FineTuneConfig(workers=2, inits=("pretrained",), **trained),
    }
    return Recipe(name="small", data=DataConfig(shards=shards), pretrain=pretrain, transfers=transfers, curve=("knn",))


@pytest.fixture(scope="module")
def unbroken(recipe, s3):
    """The whole way, undisturbed; its losses are what a broken run must repeat."""
    pretrain_then_transfer(recipe, run="unbroken", storage=join_url(s3, "pipeline/runs"), fresh=False, tags={})
    return "unbroken"


def child(run, phase, **tags):
    uri = tracking_uri()
    wanted = {"hemoco.run": run, "hemoco.phase": phase} | {f"hemoco.{name}": value for name, value in tags.items()}
    return find_run(uri, connect(uri), wanted)


def losses(run):
    """Every recorded (step, loss), redone steps several times."""
    history = MlflowClient(tracking_uri()).get_metric_history(child(run, "pretrain").run_id, "loss")
    return [(point.step, point.value) for point in history]


def test_every_transfer_has_a_row_for_each_init(unbroken, recipe, tracking):
    rows = comparison(tracking, unbroken).rows
    expected = {(name, init) for name, config in recipe.transfers.items() for init in config.inits}
    assert {(row.transfer, row.init) for row in rows} == expected
    assert all(0 < row.value <= 1 for row in rows)


def test_curve_ends_with_what_the_transfer_of_the_last_backbone_measures(unbroken, tracking):
    (point,) = MlflowClient(tracking).get_metric_history(child(unbroken, "pretrain").run_id, "curve/knn/top1")
    row = next(row for row in comparison(tracking, unbroken).rows if (row.transfer, row.init) == ("knn", "pretrained"))
    assert (point.step, point.value) == (1, row.value)
    assert child(unbroken, "curve", transfer="knn", epoch="1").status == "FINISHED"


def test_every_unit_counts_its_attempts(unbroken, recipe):
    for name, config in recipe.transfers.items():
        tags = child(unbroken, "transfer", transfer=name).tags
        counted = {tag: number for tag, number in tags.items() if tag.startswith("hemoco.attempt/")}
        assert counted == {f"hemoco.attempt/{init}/seed_0": "1" for init in config.inits}


def test_tags_lead_from_a_transfer_to_its_data(unbroken):
    transfer, pretraining = child(unbroken, "transfer", transfer="knn"), child(unbroken, "pretrain")
    assert transfer.tags["hemoco.pretrain_run_id"] == pretraining.run_id
    assert transfer.tags["hemoco.backbone_url"] == pretraining.tags["hemoco.backbone_url"]
    assert transfer.tags["hemoco.data_digest"] == pretraining.tags["hemoco.data_digest"]


def test_transfers_overlap_in_time(unbroken):
    client = MlflowClient(tracking_uri())
    runs = [client.get_run(child(unbroken, "transfer", transfer=name).run_id).info for name in ("knn", "linear_probe")]
    assert max(run.start_time for run in runs) < min(run.end_time for run in runs)


def test_finished_run_is_not_done_again(unbroken, recipe, s3, tracking):
    before = comparison(tracking, unbroken)
    began = time.monotonic()
    elsewhere = dataclasses.replace(recipe.pretrain, resources=ResourcesConfig(workers=1), keep_last=5)
    for again in (recipe, dataclasses.replace(recipe, pretrain=elsewhere)):
        pretrain_then_transfer(again, run=unbroken, storage=join_url(s3, "pipeline/runs"), fresh=False, tags={})
        assert comparison(tracking, unbroken) == before
    assert time.monotonic() - began < 30  # of training alone it would be more


def test_another_backbone_under_an_old_name_is_refused(unbroken, recipe, s3, tmp_path):
    url = child(unbroken, "pretrain").tags["hemoco.backbone_url"]
    copy = str(tmp_path / "copy.safetensors")
    write_bytes(copy, read_bytes(url))
    nothing = dataclasses.replace(recipe, transfers={}, curve=())
    storage = join_url(s3, "pipeline/runs")
    transfer_only(nothing, backbone_url=url, run="one-backbone", storage=storage, fresh=False, tags={})
    with pytest.raises(UsageError, match=r"'one-backbone' measures another backbone"):
        transfer_only(nothing, backbone_url=copy, run="one-backbone", storage=storage, fresh=False, tags={})


def test_other_settings_under_an_old_name_are_refused_with_the_difference(unbroken, recipe, s3):
    other = dataclasses.replace(recipe, pretrain=dataclasses.replace(recipe.pretrain, seed=1))
    with pytest.raises(UsageError, match=r"pretrain\.seed: 0 -> 1"):
        pretrain_then_transfer(other, run=unbroken, storage=join_url(s3, "pipeline/runs"), fresh=False, tags={})


def test_one_failing_transfer_leaves_the_others_alone_and_is_tried_again(unbroken, recipe, s3, tracking):
    pretraining = child(unbroken, "pretrain")
    frozen = {name: recipe.transfers[name] for name in ("knn", "linear_probe")}
    broken = dataclasses.replace(recipe, transfers=frozen | {"low_shot": LowShotConfig(shots=10_000)})
    for _ in range(2):  # the second time only the failed one is run
        with pytest.raises(TrainingError, match=r"1 of 3 transfers failed.*low_shot"):
            transfer_only(
                broken,
                backbone_url=pretraining.tags["hemoco.backbone_url"],
                run="one-fails",
                storage=join_url(s3, "pipeline/runs"),
                fresh=False,
                tags={},
            )
    found = comparison(tracking, "one-fails")
    assert {row.transfer for row in found.rows} == {"knn", "linear_probe"}
    assert child("one-fails", "transfer", transfer="low_shot").status == "FAILED"


@pytest.fixture(scope="module")
def broken(unbroken, recipe, s3):
    """That pretraining with one worker killed and, after it went on, one told to go away; its (step, loss) pairs."""
    storage = join_url(s3, "pipeline/runs")
    failures: list[BaseException] = []
    thread = threading.Thread(target=_pretrain_in_thread, args=(recipe, storage, failures))
    thread.start()
    checkpoints = join_url(storage, "killed/pretrain/checkpoints")

    def saved(attempt, step):
        return any(name.endswith(f"_a{attempt}") and _step_of(name) >= step for name in list_names(checkpoints))

    for signum, attempt, step in ((signal.SIGKILL, 0, 2 * INTERVAL), (signal.SIGTERM, 1, 4 * INTERVAL)):
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
    attempts = {name[-3:] for name in list_names(join_url(s3, "pipeline/runs/killed/pretrain/checkpoints"))}
    assert "_a2" in attempts, "no third attempt"


def test_final_weights_of_a_run_broken_twice_are_those_of_the_unbroken_one_bit_for_bit(unbroken, broken):
    first, second = (load_backbone(child(run, "pretrain").tags["hemoco.backbone_url"]) for run in (unbroken, "killed"))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in first.state_dict())


@pytest.fixture(scope="module")
def cifar(s3, ray_cluster, tracking, shared_data):
    """10,000 CIFAR-10 images on S3, and a pretraining of 2 workers on them."""
    url = join_url(s3, "pipeline/cifar10")
    pack((str(shared_data / "cifar10" / "test.zip"),), url, split="train", samples_per_shard=700, seed=0)
    recipe = small_recipe(url)
    pretrain = dataclasses.replace(
        recipe.pretrain,
        global_batch_size=240,
        moco=MoCoConfig(queue_length=480, bn_group_size=24),
        stream=StreamConfig(workers=2, lanes=12, shards_per_block=2),
    )
    data = DataConfig(shards=url, pretrain_split="test")
    return dataclasses.replace(recipe, data=data, pretrain=pretrain, transfers={}, curve=())


@pytest.mark.slow
def test_curve_is_measured_while_the_pretraining_goes_on(recipe, s3):
    alone = {
        "epochs": 12,
        "export_every_epochs": 4,
        "resources": ResourcesConfig(workers=1),
        "stream": StreamConfig(workers=0, lanes=8),
    }
    pretrain = dataclasses.replace(recipe.pretrain, **alone)
    pretrain_only(
        dataclasses.replace(recipe, pretrain=pretrain), run="curve", storage=join_url(s3, "runs"), fresh=False, tags={}
    )
    client = MlflowClient(tracking_uri())
    ends = [
        client.get_run(child("curve", "curve", transfer="knn", epoch=str(epoch)).run_id).info.end_time
        for epoch in (4, 8, 12)
    ]
    assert sorted(ends) == ends
    assert ends[0] < client.get_metric_history(child("curve", "pretrain").run_id, "loss")[-1].timestamp
    curve = client.get_metric_history(child("curve", "pretrain").run_id, "curve/knn/top1")
    assert sorted(point.step for point in curve) == [4, 8, 12]


@pytest.mark.slow
def test_run_that_lost_a_core_goes_on_with_one_worker_on_the_same_global_batches(cifar, s3, caplog):
    class Idle:  # here, so that it travels by value: workers do not find the tests
        """Holds the core it was given."""

    storage = join_url(s3, "pipeline/runs")
    failures: list[BaseException] = []
    thread = threading.Thread(target=_pretrain_in_thread, args=(cifar, storage, failures, "shrunk"))
    thread.start()
    checkpoints = join_url(storage, "shrunk/pretrain/checkpoints")
    wait_until(lambda: failures or any(_step_of(name) >= 2 * INTERVAL for name in list_names(checkpoints)), seconds=240)
    assert not failures
    usurper = ray.remote(num_cpus=1)(Idle).remote()  # waits for the first core that becomes free
    time.sleep(random.uniform(0, 4))
    os.kill(_train_workers()[-1], signal.SIGKILL)
    thread.join(timeout=400)
    ray.kill(usurper)
    assert not failures
    history = MlflowClient(tracking_uri()).get_metric_history(child("shrunk", "pretrain").run_id, "batch_fingerprint")
    expected = fingerprints(cifar.data.shards, cifar.data.pretrain_split, cifar.pretrain)
    assert {(point.step, point.value) for point in history} == set(expected.items())
    assert "event=world_size from=2 to=1" in caplog.text


def _pretrain_in_thread(recipe, storage, failures, run="killed"):
    try:
        pretrain_only(recipe, run=run, storage=storage, fresh=False, tags={})
    except BaseException as error:
        failures.append(error)


def _train_workers():
    """Pids of the training processes of this session's Ray, which set their title."""
    found = []
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return sorted(found)


def _step_of(checkpoint_name):
    return int(checkpoint_name.split("_")[1])


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(recipe, bucket):
    def steps():
        yield 1
        raise TrainingError("the loss is nan")

    with pytest.raises(TrainingError, match="the loss is nan; the last good checkpoint: there is none yet"):
        list(_naming_checkpoint(steps(), bucket))
    state = build_state(recipe.pretrain, torch.device("cpu"), data_digest="d")
    saved = save_checkpoint(state, bucket, attempt=0, keep_last=1)
    with pytest.raises(TrainingError, match=f"last good checkpoint: {saved}"):
        list(_naming_checkpoint(steps(), bucket))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrain_split": "nope"}, "train"),
        ({"shards": "file:///nowhere"}, "jobs pack"),
    ],
)
def test_recipe_that_does_not_fit_its_data_is_refused_before_any_work(recipe, change, message):
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **change))
    with pytest.raises(HemocoError, match=message):
        check_pretraining(other)
