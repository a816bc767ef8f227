"""Backbones in MLflow's registry, on real SQLite stores: logged, read, listed and deleted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import hemoco
from hemoco.backbones.file import backbone_metadata, export_backbone, random_backbone
from hemoco.config import EncoderConfig
from hemoco.errors import CheckpointError, TrackingError, UsageError
from hemoco.storage.objects import list_names, write_bytes
from hemoco.tracking.client import connect
from hemoco.tracking.models import (
    BackboneRecord,
    Data,
    Measured,
    alias_name,
    link_models,
    log_results,
    models_name,
    record_backbone,
    record_snapshot,
    register_version,
)
from hemoco.tracking.runs import log_dataset_input, open_run, set_tags
from hemoco.tracking.versions import backbone_versions, pinned
from jobs.cli import main

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ENCODER = EncoderConfig(architecture="resnet10t")
DATA = Data("cells/shards", "d" * 64)


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def uri(schema, tmp_path, monkeypatch):
    shutil.copy(schema, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def run_id(uri, tmp_path):
    """MLflow's id of a pretraining, whose parent run has the folder."""
    experiment, storage = connect(uri), f"{tmp_path}/runs/a"
    tags = {"hemoco.run": "a", "hemoco.phase": "parent", "hemoco.storage": storage}
    parent = open_run(uri, experiment, name="a", parent=None, tags=tags, params={})
    MlflowClient(uri).set_terminated(parent)
    child = open_run(
        uri, experiment, name="pretrain", parent=parent, tags={"hemoco.run": "a"}, params={}
    )
    MlflowClient(uri).set_terminated(child)
    return child


@pytest.fixture
def url(tmp_path, run_id):
    place = str(tmp_path / "runs" / "a" / "pretrain" / "backbone.safetensors")
    backbone = random_backbone(ENCODER, 0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    export_backbone(backbone, place, {"data_digest": DATA.digest, "run_id": run_id})
    return place


def record(uri, url, run_id):
    """Logs a backbone; returns the id of its model."""
    about = backbone_metadata(url)
    tags = {"hemoco.run": "a", "hemoco.recipe": "small"}
    described = BackboneRecord(
        name="a", run_id=run_id, step=3, params={"epochs": "3"}, tags=tags, about=about
    )
    return record_backbone(uri, connect(uri), url, described)


def register(uri, model_id, alias="a"):
    tags = {"hemoco.run": "a", "hemoco.recipe": "small", "hemoco.architecture": "resnet10t"}
    return register_version(uri, model_id, models_name("small"), alias, tags)


def features(backbone):
    with torch.no_grad():
        return backbone(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))


def test_backbone_that_is_recorded_twice_is_one_model_and_one_output_of_its_run(uri, url, run_id):
    first = record(uri, url, run_id)
    assert record(uri, url, run_id) == first
    (output,) = MlflowClient(uri).get_run(run_id).outputs.model_outputs
    assert (output.model_id, output.step) == (first, 3)


def test_same_file_under_another_url_is_the_same_model(uri, url, run_id, tmp_path):
    copy = shutil.copy(url, tmp_path / "copy.safetensors")
    assert record(uri, str(copy), "") == record(uri, url, run_id)


def test_model_whose_upload_failed_is_completed_by_the_next_attempt(uri, url, run_id, tmp_path):
    connect(uri)
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    with pytest.raises(TrackingError, match="cannot store the backbone"):
        record(uri, url, run_id)
    client = MlflowClient(uri)
    (left,) = client.search_logged_models([connect(uri)])
    (tmp_path / "mlartifacts").unlink()
    assert record(uri, url, run_id) == left.model_id
    assert str(client.get_logged_model(left.model_id).status) == "READY"


def test_every_name_of_a_backbone_loads_the_same_weights(uri, url, run_id):
    model_id = record(uri, url, run_id)
    version = register(uri, model_id)
    expected = features(hemoco.load_backbone(url))
    for name in ("hemoco-small@a", f"hemoco-small/{version}", "hemoco-small/latest", model_id):
        assert torch.equal(features(hemoco.load_backbone(f"models:/{name}")), expected)


def test_backbone_is_registered_once_and_not_again_after_it_was_deleted(uri, url, run_id):
    model_id = record(uri, url, run_id)
    assert register(uri, model_id) == register(uri, model_id) == "1"
    assert [one.version for one in backbone_versions(uri)] == [1]
    assert main(["backbones", "delete", "hemoco-small", "1"]) == 0
    assert register(uri, record(uri, url, run_id)) == "1"
    assert backbone_versions(uri) == []


def test_version_that_a_killed_attempt_made_is_taken_over(uri, url, run_id):
    model_id = record(uri, url, run_id)
    client = MlflowClient(uri)
    client.create_registered_model("hemoco-small")
    source = client.get_logged_model(model_id).artifact_location
    client.create_model_version("hemoco-small", source, run_id, tags={"hemoco.model_id": model_id})
    assert register(uri, model_id) == "1"
    assert client.get_model_version_by_alias("hemoco-small", "a").version == 1


def test_mlflow_shows_versions_on_the_page_of_the_model(uri, url, run_id):
    model_id = record(uri, url, run_id)
    register(uri, model_id)
    shown = MlflowClient(uri).get_logged_model(model_id).tags["mlflow.modelVersions"]
    assert json.loads(shown) == [{"name": "hemoco-small", "version": "1"}]


def test_damaged_file_in_mlflow_is_refused(uri, url, run_id, tmp_path):
    model_id = record(uri, url, run_id)
    (stored,) = (tmp_path / "mlartifacts").rglob("backbone.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="not the one that was recorded"):
        hemoco.load_backbone(f"models:/{model_id}")


def test_snapshot_is_found_again_and_read_from_where_it_lies(uri, url, run_id, tmp_path):
    described = BackboneRecord(name="a", run_id=run_id, step=1, params={}, tags={}, about={})
    first, again = (record_snapshot(uri, connect(uri), url, described) for _ in range(2))
    assert first == again
    assert torch.equal(
        features(hemoco.load_backbone(f"models:/{first}")), features(hemoco.load_backbone(url))
    )
    assert not list((tmp_path).rglob("mlartifacts/**/*.safetensors"))


@pytest.mark.parametrize(
    "wrong", ["models:/", "models:/a", "models:/a/Production", "models:/a@", "models:/a/1/x"]
)
def test_wrong_name_of_a_model_says_what_to_use(uri, wrong):
    with pytest.raises(UsageError, match=r"use models:/NAME@ALIAS"):
        hemoco.load_backbone(wrong)


def test_unknown_models_and_those_of_others_are_refused(uri):
    MlflowClient(uri).create_registered_model("theirs")
    MlflowClient(uri).create_model_version("theirs", "s3://somewhere/else")
    for name in ("theirs/1", "theirs/latest", "nothing/latest"):
        with pytest.raises(UsageError, match="no backbone of hemoco"):
            pinned(f"models:/{name}")
    with pytest.raises(TrackingError, match="not found"):
        pinned("models:/theirs@nobody")


@pytest.mark.parametrize(
    ("run", "alias"),
    [
        ("a-1", "a-1"),
        ("a.b c", "a-b-c"),
        ("latest", "run-latest"),
        ("v3", "run-v3"),
        ("v3a", "v3a"),
    ],
)
def test_every_run_name_makes_an_alias_that_mlflow_takes(uri, url, run_id, run, alias):
    assert alias_name(run) == alias
    register(uri, record(uri, url, run_id), alias_name(run))
    assert pinned(f"models:/hemoco-small@{alias}").startswith("models:/m-")


@pytest.fixture
def measured(uri, url, run_id):
    """Id of a registered model with the result of a transfer."""
    model_id = record(uri, url, run_id)
    register(uri, model_id)
    transfer = open_run(
        uri, connect(uri), name="knn", parent=None, tags={"hemoco.phase": "transfer"}, params={}
    )
    log_dataset_input(
        uri,
        transfer,
        DATA.name,
        "s3://cells/shards",
        DATA.digest,
        "transfer",
        counts={"samples": 7},
    )
    for _ in range(2):  # as a second attempt does
        link_models(uri, transfer, [model_id, model_id])
    log_results(uri, transfer, [Measured("knn/top1", 0.75, 0, model_id)], DATA)
    return model_id


def test_results_stand_on_the_model_with_their_data_and_run(uri, measured):
    client = MlflowClient(uri)
    (metric,) = client.get_logged_model(measured).metrics
    transfer = client.get_run(metric.run_id)
    (data,) = transfer.inputs.dataset_inputs
    assert (metric.key, metric.value, transfer.data.metrics["knn/top1"]) == ("knn/top1", 0.75, 0.75)
    assert (metric.dataset_name, metric.dataset_digest) == (data.dataset.name, data.dataset.digest)
    assert [model.model_id for model in transfer.inputs.model_inputs] == [measured]
    assert json.loads(data.dataset.profile) == {"samples": 7}


def test_list_shows_what_a_backbone_is_and_measured(measured, capsys):
    assert main(["backbones"]) == 0
    shown = capsys.readouterr().out
    for word in ("hemoco-small", "resnet10t", "small", "knn/top1 0.7500", "models:/hemoco-small/1"):
        assert word in shown


def test_alias_is_given_and_a_reserved_one_is_refused(measured, capsys):
    assert main(["backbones", "alias", "hemoco-small", "1", "best"]) == 0
    assert pinned("models:/hemoco-small@best") == f"models:/{measured}"
    assert main(["backbones", "alias", "hemoco-small", "1", "latest"]) == 2
    assert "use letters, digits" in capsys.readouterr().err


def test_version_with_an_alias_that_somebody_gave_is_deleted_only_by_force(uri, measured, capsys):
    main(["backbones", "alias", "hemoco-small", "1", "best"])
    assert main(["backbones", "delete", "hemoco-small", "1"]) == 2
    assert "has the alias best" in capsys.readouterr().err
    assert main(["backbones", "delete", "hemoco-small", "1", "--force"]) == 0
    assert backbone_versions(uri) == []
    assert MlflowClient(uri).get_logged_model(measured).metrics  # its results stay


def test_dry_run_names_what_would_go_and_deletes_nothing(uri, measured, url, capsys):
    folder = Path(url).parent / "checkpoints"
    write_bytes(f"{folder}/step_00000010_a0/manifest.json", b"{}")
    write_bytes(f"{folder}/notes.txt", b"mine")
    words = ["backbones", "delete", "hemoco-small", "1", "--checkpoints"]
    assert main([*words, "--dry_run"]) == 0
    assert "would delete  checkpoint" in capsys.readouterr().out
    assert len(backbone_versions(uri)) == 1 and len(list_names(str(folder))) == 2
    assert main(words) == 0
    assert backbone_versions(uri) == [] and list_names(str(folder)) == ["notes.txt"]
    assert Path(url).exists()


def test_checkpoints_of_a_run_at_work_or_begun_anew_are_not_deleted(
    uri, measured, run_id, tmp_path, capsys
):
    words = ["backbones", "delete", "hemoco-small", "1", "--checkpoints"]
    MlflowClient(uri).update_run(run_id, status="RUNNING")
    assert main(words) == 2 and "stop it first" in capsys.readouterr().err
    tags = {"hemoco.phase": "parent", "hemoco.storage": f"{tmp_path}/runs/a"}
    set_tags(
        uri,
        open_run(uri, connect(uri), name="a", parent=None, tags=tags, params={}),
        {"hemoco.run": "a"},
    )
    assert main(words) == 2 and "begun anew" in capsys.readouterr().err
    assert len(backbone_versions(uri)) == 1


def test_checkpoints_in_a_folder_that_is_not_the_runs_are_not_deleted(uri, measured, url, capsys):
    folder = Path(url).parent.parent
    write_bytes(f"{folder}/pretrain/checkpoints/step_00000010_a0/manifest.json", b"{}")
    write_bytes(f"{folder}/hemoco-run.json", b'{"run": "b"}')
    assert main(["backbones", "delete", "hemoco-small", "1", "--checkpoints"]) == 2
    assert "names run 'b'" in capsys.readouterr().err
    assert (
        list_names(f"{folder}/pretrain/checkpoints") == ["step_00000010_a0"]
        and len(backbone_versions(uri)) == 1
    )


def test_unknown_version_and_action_are_wrong_usage(uri, measured, capsys):
    assert main(["backbones", "delete", "hemoco-small", "7"]) == 2
    assert (
        "no backbone hemoco-small 7 is registered; there is hemoco-small 1"
        in capsys.readouterr().err
    )
    assert main(["backbones", "delet"]) == 2
    assert "did you mean delete?" in capsys.readouterr().err


def test_two_models_share_a_key_and_the_run_shows_the_last(uri, url, run_id, tmp_path):
    other = str(tmp_path / "other.safetensors")
    export_backbone(
        random_backbone(ENCODER, 1, (0.5,) * 3, (0.2,) * 3),
        other,
        {"data_digest": "d", "run_id": ""},
    )
    theirs, ours = record(uri, other, ""), record(uri, url, run_id)
    log_results(
        uri,
        run_id,
        [Measured("knn/top1", 0.9, 0, theirs), Measured("knn/top1", 0.8, 0, ours)],
        DATA,
    )
    client = MlflowClient(uri)
    assert [client.get_logged_model(model).metrics[0].value for model in (theirs, ours)] == [
        0.9,
        0.8,
    ]
    assert client.get_run(run_id).data.metrics["knn/top1"] == 0.8


def test_results_of_deleted_models_are_absent_not_an_error(uri, measured):
    MlflowClient(uri).delete_logged_model(measured)
    (one,) = backbone_versions(uri)
    assert one.results == {}
