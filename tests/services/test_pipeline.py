"""Pretraining, transfers and their records on a real Ray, S3 server and MLflow."""

import dataclasses
import time

import pytest
import torch
from mlflow import MlflowClient
from torch.nn import functional

from hemoco.backbones.file import load_backbone
from hemoco.config import (
    LowShotConfig,
    ResourcesConfig,
)
from hemoco.config.kinds import method_name, transfer_kind
from hemoco.data.labelled import load_images
from hemoco.data.shards.index import ShardIndexes, read_index
from hemoco.errors import HemocoError, TrainingError, UsageError
from hemoco.features.extract import extract_features
from hemoco.features.sample import FILE_NAME, decode_sample
from hemoco.results.records import run_results
from hemoco.storage.objects import join_url, read_bytes, write_bytes
from hemoco.tracking.client import tracking_uri
from hemoco.tracking.runs import read_artifacts
from hemoco.tracking.tags import Tag
from hemoco.train.checkpoint import save_checkpoint
from hemoco.train.pretrain import build_state
from pipeline.checks import check_pretraining
from pipeline.pretrain import _naming_checkpoint
from pipeline.run import pretrain_then_transfer, transfer_only
from tests.helpers.small_study import child, pack_digits, small_recipe


@pytest.fixture(scope="module")
def recipe(s3, ray_cluster, tracking, tmp_path_factory):
    return small_recipe(pack_digits(s3, tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def unbroken(recipe, s3):
    """A run without interruption, whose losses an interrupted run must repeat."""
    pretrain_then_transfer(
        recipe,
        indexes=ShardIndexes(),
        run="unbroken",
        storage=join_url(s3, "pipeline/runs"),
        fresh=False,
        tags={},
    )
    return "unbroken"


def test_every_transfer_has_a_row_for_each_init(unbroken, recipe, tracking):
    rows = run_results(tracking, unbroken).rows
    expected = {(name, init) for name, config in recipe.transfers.items() for init in config.inits}
    assert {(row.transfer, row.init) for row in rows} == expected
    assert all(0 < row.value <= 1 for row in rows)
    # they run in parallel, and still come in the order of the recipe
    assert list(dict.fromkeys(row.transfer for row in rows)) == list(recipe.transfers)


def test_curve_ends_with_what_the_transfer_of_the_last_backbone_measures(unbroken, tracking):
    (point,) = MlflowClient(tracking).get_metric_history(
        child(unbroken, "pretrain").run_id, "curve/knn/top1"
    )
    row = next(
        row
        for row in run_results(tracking, unbroken).rows
        if (row.transfer, row.init) == ("knn", "pretrained")
    )
    assert (point.step, point.value) == (1, row.value)
    assert child(unbroken, "curve", transfer="knn", epoch="1").status == "FINISHED"


def test_the_method_and_the_kinds_of_transfers_are_recorded(unbroken, recipe):
    assert child(unbroken, "pretrain").tags[Tag.METHOD] == method_name(recipe.pretrain.moco)
    for name, config in recipe.transfers.items():
        assert child(unbroken, "transfer", transfer=name).tags[Tag.TRANSFER_KIND] == transfer_kind(
            config
        )


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


def test_the_pretraining_keeps_features_of_test_images_for_the_map(unbroken, recipe, tracking):
    (kept,) = read_artifacts(tracking, child(unbroken, "pretrain").run_id, FILE_NAME).values()
    sample = decode_sample(kept)
    backbone = load_backbone(child(unbroken, "pretrain").tags["hemoco.backbone_url"])
    images, labels, keys = load_images(
        recipe.data.shards, read_index(recipe.data.shards), "test", 32
    )
    rows = [keys.index(key) for key in sample.keys[:20]]
    assert sample.labels[:20].tolist() == labels[rows].tolist() and len(sample.keys) > 300
    wanted = functional.normalize(extract_features(backbone, images[rows]))
    assert torch.allclose(sample.features[:20].float(), wanted, rtol=0, atol=1e-3)


def test_transfers_overlap_in_time(unbroken):
    client = MlflowClient(tracking_uri())
    runs = [
        client.get_run(child(unbroken, "transfer", transfer=name).run_id).info
        for name in ("knn", "linear_probe")
    ]
    assert max(run.start_time for run in runs) < min(run.end_time for run in runs)


def test_finished_run_is_not_done_again(unbroken, recipe, s3, tracking):
    before = run_results(tracking, unbroken)
    began = time.monotonic()
    elsewhere = dataclasses.replace(
        recipe.pretrain, resources=ResourcesConfig(workers=1), keep_last=5
    )
    for again in (recipe, dataclasses.replace(recipe, pretrain=elsewhere)):
        pretrain_then_transfer(
            again,
            indexes=ShardIndexes(),
            run=unbroken,
            storage=join_url(s3, "pipeline/runs"),
            fresh=False,
            tags={},
        )
        assert run_results(tracking, unbroken) == before
    assert time.monotonic() - began < 30  # of training alone it would be more


def test_another_backbone_under_an_old_name_is_refused(unbroken, recipe, s3, tmp_path):
    url = child(unbroken, "pretrain").tags["hemoco.backbone_url"]
    copy = (tmp_path / "copy.safetensors").as_uri()
    write_bytes(copy, read_bytes(url))
    nothing = dataclasses.replace(recipe, transfers={}, curve=())
    storage = join_url(s3, "pipeline/runs")
    transfer_only(
        nothing,
        indexes=ShardIndexes(),
        backbone_url=url,
        run="one-backbone",
        storage=storage,
        fresh=False,
        tags={},
    )
    with pytest.raises(UsageError, match=r"'one-backbone' measures another backbone"):
        transfer_only(
            nothing,
            indexes=ShardIndexes(),
            backbone_url=copy,
            run="one-backbone",
            storage=storage,
            fresh=False,
            tags={},
        )


def test_other_settings_under_an_old_name_are_refused_with_the_difference(unbroken, recipe, s3):
    other = dataclasses.replace(recipe, pretrain=dataclasses.replace(recipe.pretrain, seed=1))
    with pytest.raises(UsageError, match=r"pretrain\.seed: 0 -> 1"):
        pretrain_then_transfer(
            other,
            indexes=ShardIndexes(),
            run=unbroken,
            storage=join_url(s3, "pipeline/runs"),
            fresh=False,
            tags={},
        )


def test_one_failing_transfer_leaves_the_others_alone_and_is_tried_again(
    unbroken, recipe, s3, tracking
):
    pretraining = child(unbroken, "pretrain")
    frozen = {name: recipe.transfers[name] for name in ("knn", "linear_probe")}
    broken = dataclasses.replace(
        recipe, transfers=frozen | {"low_shot": LowShotConfig(shots=10_000)}
    )
    for _ in range(2):  # the second time only the failed one is run
        with pytest.raises(TrainingError, match=r"1 of 3 transfers failed.*low_shot"):
            transfer_only(
                broken,
                indexes=ShardIndexes(),
                backbone_url=pretraining.tags["hemoco.backbone_url"],
                run="one-fails",
                storage=join_url(s3, "pipeline/runs"),
                fresh=False,
                tags={},
            )
    found = run_results(tracking, "one-fails")
    assert {row.transfer for row in found.rows} == {"knn", "linear_probe"}
    assert child("one-fails", "transfer", transfer="low_shot").status == "FAILED"


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(recipe, bucket):
    def steps():
        yield 1
        raise TrainingError("the loss is nan")

    with pytest.raises(
        TrainingError, match="the loss is nan; the last good checkpoint: there is none yet"
    ):
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
        check_pretraining(other, ShardIndexes())
