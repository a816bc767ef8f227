"""Lineage in MLflow: from data to pretraining, backbone and transfers and back, and the machine."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

import hemoco
from cluster.local.servers import mlflow_server
from hemoco.backbones.file import backbone_metadata, export_backbone, random_backbone
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    KnnConfig,
    LinearProbeConfig,
    MoCoConfig,
    PretrainConfig,
    Recipe,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.shards.index import ShardIndexes
from hemoco.results.records import run_results
from hemoco.storage.objects import join_url
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.metric_queue import Tracker
from hemoco.tracking.models import BackboneRecord, record_backbone, register_version
from hemoco.tracking.runs import log_dataset_input, open_run, set_tags
from hemoco.tracking.system_metrics import SystemMetrics, machine_facts
from hemoco.tracking.unsent import read_points, unsent_files
from hemoco.tracking.versions import backbone_versions
from jobs.options import load_recipe
from pipeline.open_run import open_child, open_study
from pipeline.run import pretrain_only, pretrain_then_transfer, transfer_only
from tests.helpers.mlflow_proxy import mlflow_proxy
from tests.helpers.shard_folders import write_shards
from tests.helpers.waiting import wait_until

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ROOT = Path(__file__).parents[2]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
# what MLflow's own client finds without hemoco
CLIENT = """
import json, sys
from mlflow import MlflowClient
client, digest = MlflowClient(), sys.argv[1]
experiments = [each for each in client.search_experiments() if each.name == "hemoco"]
(experiment,) = [each.experiment_id for each in experiments]

def runs(wanted):
    return client.search_runs([experiment], wanted)

(pretraining,) = runs(f"dataset.digest = '{digest[:36]}' and dataset.context = 'pretraining'")
(output,) = client.get_run(pretraining.info.run_id).outputs.model_outputs
model = client.get_logged_model(output.model_id)
(version,) = client.search_model_versions(f"run_id = '{pretraining.info.run_id}'")
from_model = runs(f"tags.`hemoco.model/pretrained` = '{model.model_id}'")
of_the_data = runs(f"dataset.digest = '{digest[:36]}'")
forward = {
    "pretraining": pretraining.info.run_id,
    "backbone": model.model_id,
    "version": [version.name, version.version, version.tags["hemoco.model_id"]],
    "results": {each.run_id: [each.key, each.value, each.dataset_digest] for each in model.metrics},
    "transfers": sorted(run.info.run_id for run in from_model),
    "of_the_data": sorted(run.info.run_id for run in of_the_data),
}
back = {}
for run_id in forward["transfers"]:
    inputs = client.get_run(run_id).inputs
    models = [client.get_logged_model(each.model_id) for each in inputs.model_inputs]
    (start,) = [each for each in models if each.source_run_id]
    (data,) = client.get_run(start.source_run_id).inputs.dataset_inputs
    back[run_id] = [start.model_id, start.source_run_id, data.dataset.digest]
ours = ("hemoco", "pipeline", "jobs", "cluster")
assert not [name for name in sys.modules if name.split(".")[0] in ours]
print(json.dumps([forward, back]))
"""


@pytest.fixture(scope="module")
def recipe(s3, ray_cluster, tracking):
    """A small recipe on S3, with an imported backbone as another baseline."""
    shards = write_shards(join_url(s3, "lineage/cells"), [40])
    theirs = join_url(s3, "lineage/theirs.safetensors")
    export_backbone(
        backbone(1),
        theirs,
        {"data_digest": "unknown", "run_id": "", "source": "imported from moco"},
    )
    inits = ("pretrained", "random", f"theirs={theirs}")
    return Recipe(
        name="lineage",
        data=DataConfig(
            shards=shards, pretrain_split="train", train_split="train", test_split="train"
        ),
        pretrain=PretrainConfig(
            epochs=1,
            global_batch_size=20,
            knn_every_epochs=0,
            views=ViewsConfig(size=32, mean=MEAN, std=STD),
            encoder=EncoderConfig(architecture="resnet10t"),
            moco=MoCoConfig(queue_length=40, bn_group_size=10, embedding_size=16),
            stream=StreamConfig(workers=0, lanes=2),
        ),
        transfers={
            "knn": KnnConfig(neighbours=4, inits=inits, seeds=(0, 1)),
            "probe": LinearProbeConfig(epochs=2, inits=("pretrained",)),
        },
    )


def backbone(seed):
    return random_backbone(EncoderConfig(architecture="resnet10t"), seed, MEAN, STD)


def pretrained_before(recipe, run, storage):
    """A run whose pretraining is finished but not recorded, as an outage of MLflow leaves it."""
    study = open_study(
        recipe, indexes=ShardIndexes(), run=run, storage=storage, fresh=False, tags={}
    )
    tags = {"hemoco.run": run, "hemoco.phase": "pretrain", "hemoco.data_digest": study.data.digest}
    child, _ = open_child(study, "pretrain", tags)
    url = join_url(study.url, "pretrain/backbone.safetensors")
    export_backbone(backbone(0), url, {"data_digest": study.data.digest, "run_id": child})
    set_tags(study.uri, child, {"hemoco.backbone_url": url})
    MlflowClient(study.uri).set_terminated(child)
    return child, url, study.data.digest


@pytest.fixture(scope="module")
def lineage(recipe, s3):
    """A whole run without the training itself.

    Its name, the id of its pretraining, the URL of its backbone, and the digest of its data.
    """
    storage = join_url(s3, "lineage/runs")
    child, url, digest = pretrained_before(recipe, "lineage-1", storage)
    log_dataset_input(
        tracking_uri(), child, "lineage/cells", recipe.data.shards, digest, "pretraining"
    )
    for _ in range(2):  # the second time nothing is left to do
        pretrain_then_transfer(
            recipe, indexes=ShardIndexes(), run="lineage-1", storage=storage, fresh=False, tags={}
        )
    return "lineage-1", child, url, digest


def features(model):
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        return model(images)


def test_client_alone_walks_from_data_to_every_transfer_and_back(lineage, tracking):
    run, child, _, digest = lineage
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, digest], capture_output=True, text=True, check=True
    )
    forward, back = json.loads(done.stdout)
    rows = [row for row in run_results(tracking, run).rows if row.init == "pretrained"]
    means = {row.run_id: [r.value for r in rows if r.run_id == row.run_id] for row in rows}
    keys = {row.run_id: f"{row.transfer}/{row.metric}" for row in rows}
    assert forward["pretraining"] == child and forward["version"] == [
        "hemoco-lineage",
        1,
        forward["backbone"],
    ]
    assert forward["results"] == {
        run_id: [keys[run_id], pytest.approx(sum(v) / len(v)), digest[:36]]
        for run_id, v in means.items()
    }
    assert forward["transfers"] == sorted(means) and forward["of_the_data"] == sorted(
        [child, *means]
    )
    assert back == {run_id: [forward["backbone"], child, digest[:36]] for run_id in means}


def test_registry_url_and_timm_give_equal_features(lineage):
    run, _, url, _ = lineage
    folder = Path(download_artifacts(f"models:/hemoco-lineage@{run}"))
    about = json.loads((folder / "backbone.json").read_text())
    plain = timm.create_model(about["architecture"], num_classes=0).eval()
    plain.load_state_dict(safetensors.torch.load_file(folder / "backbone.safetensors"))
    expected = features(plain)
    for name in (url, f"models:/hemoco-lineage@{run}"):
        assert torch.equal(features(hemoco.load_backbone(name)), expected)
    assert json.loads(about["mean"]) == list(MEAN)


def test_imported_backbone_has_a_model_that_shows_its_own_results(lineage, tracking):
    client = MlflowClient(tracking)
    (theirs,) = [m for m in client.search_logged_models([connect(tracking)]) if m.name == "theirs"]
    (metric,) = theirs.metrics
    rows = [row.value for row in run_results(tracking, lineage[0]).rows if row.init == "theirs"]
    assert (metric.key, metric.value) == ("knn/top1", pytest.approx(sum(rows) / len(rows)))
    assert theirs.tags["hemoco.source"] == "imported from moco" and theirs.source_run_id is None


def test_transfers_from_a_registered_backbone_join_its_results(lineage, recipe, s3, tracking):
    run, child, _, _ = lineage
    only = dataclasses.replace(
        recipe, transfers={"again": KnnConfig(neighbours=4, inits=("pretrained",))}
    )
    storage, name = join_url(s3, "lineage/runs"), f"models:/hemoco-lineage@{run}"
    transfer_only(
        only,
        indexes=ShardIndexes(),
        backbone_url=name,
        run="lineage-2",
        storage=storage,
        fresh=False,
        tags={},
    )
    (version,) = [one for one in backbone_versions(tracking) if one.run == run]
    assert version.run_id == child and version.results.keys() == {
        "knn/top1",
        "probe/top1",
        "again/top1",
    }
    assert (
        run_results(tracking, "lineage-2").pretraining.backbone_url == f"models:/{version.model_id}"
    )


def test_recipe_in_mlflow_is_one_that_runs(lineage, recipe, tracking, tmp_path):
    client = MlflowClient(tracking)
    (parent,) = client.search_runs(
        [connect(tracking)], "tags.hemoco.run = 'lineage-1' and tags.hemoco.phase = 'parent'"
    )
    path = client.download_artifacts(parent.info.run_id, "recipe.py", str(tmp_path))
    assert load_recipe(path) == recipe


def test_transfer_knows_its_machine(lineage, tracking):
    found = {row.run_id for row in run_results(tracking, lineage[0]).rows}
    for run_id in found:
        tags = MlflowClient(tracking).get_run(run_id).data.tags
        assert machine_facts().items() <= tags.items()


@pytest.fixture
def run_id(tracking):
    return open_run(tracking, connect(tracking), name="machine", parent=None, tags={}, params={})


def test_system_metrics_go_to_the_step_that_training_logged_last(tracking, run_id, tmp_path):
    client = MlflowClient(tracking)
    with (
        Tracker(tracking, run_id, str(tmp_path)) as tracker,
        SystemMetrics(tracking, run_id, tracker, every_s=0.05),
    ):
        tracker.log(7, {"loss": 1.0})
        wait_until(
            lambda: "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics, 60
        )
    run = client.get_run(run_id)
    points = {point.key: point for point in run.data.to_proto().metrics}
    assert points["system/cpu_utilization_percentage"].step == 7
    assert 0 <= points["system/cpu_utilization_percentage"].value <= 100
    assert 0 < points["system/system_memory_usage_percentage"].value < 100
    assert machine_facts().items() <= run.data.tags.items()


def test_system_metrics_of_an_outage_are_kept_with_the_others(tmp_path):
    uri, unsent = "http://127.0.0.1:9", str(tmp_path)
    tracker = Tracker(uri, "r1", unsent)

    def kept():
        tracker.keep()
        return {point.key for url in unsent_files(unsent) for point in read_points(url)}

    with SystemMetrics(uri, "r1", tracker, every_s=0.05):
        tracker.log(1, {"loss": 1.0})
        wait_until(lambda: {"loss", "system/cpu_utilization_percentage"} <= kept(), 60)
    tracker.close(timeout_s=0)


def test_server_that_is_away_for_a_moment_takes_the_backbone_once(tmp_path, monkeypatch):
    place = str(tmp_path / "b.safetensors")
    export_backbone(backbone(0), place, {"data_digest": "d", "run_id": ""})
    with mlflow_server(tmp_path / "server") as server, mlflow_proxy(server.uri) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
        experiment, about = connect(proxy.uri), backbone_metadata(place)
        described = BackboneRecord(name="a", run_id="", step=0, params={}, tags={}, about=about)
        proxy.mode = "down"
        threading.Timer(3, lambda: setattr(proxy, "mode", "pass")).start()
        model_id = record_backbone(proxy.uri, experiment, place, described)
        assert register_version(proxy.uri, model_id, "hemoco-a", "a", {}) == "1"
        assert (
            MlflowClient(proxy.uri).get_model_version("hemoco-a", "1").source
            == f"models:/{model_id}"
        )
        expected = features(hemoco.load_backbone(place))
        assert torch.equal(features(hemoco.load_backbone("models:/hemoco-a@a")), expected)


def test_pretraining_has_its_backbone_and_every_snapshot_as_outputs(recipe, s3, tracking):
    pretrain = dataclasses.replace(recipe.pretrain, epochs=2, export_every_epochs=1)
    measured = {"knn": KnnConfig(neighbours=4, inits=("pretrained",))}
    longer = dataclasses.replace(
        recipe, name="longer", pretrain=pretrain, transfers=measured, curve=("knn",)
    )
    storage, client = join_url(s3, "lineage/runs"), MlflowClient(tracking)
    first, again = (
        pretrain_only(
            longer, indexes=ShardIndexes(), run="lineage-3", storage=storage, fresh=False, tags={}
        ).run_id
        for _ in range(2)
    )
    assert first == again
    assert machine_facts().items() <= client.get_run(first).data.tags.items()
    outputs = client.get_run(first).outputs.model_outputs
    models = [client.get_logged_model(output.model_id) for output in outputs]
    steps = {(model.model_type, output.step) for model, output in zip(models, outputs, strict=True)}
    assert steps == {
        ("moco-backbone", 2),
        ("moco-backbone-snapshot", 1),
        ("moco-backbone-snapshot", 2),
    }
    curve = {
        metric.step
        for model in models
        for metric in (model.metrics or [])
        if metric.key == "knn/top1"
    }
    assert curve == {1, 2} and len(models) == 3
    assert [one.version for one in backbone_versions(tracking) if one.run == "lineage-3"] == [1]
