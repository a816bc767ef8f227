"""Detectors learn real cells and drawn shapes in minutes on two cores, from shards to MLflow."""

import pytest

from hemoco.backbones.file import export_backbone, random_backbone
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    FasterRcnnConfig,
    MaskRcnnConfig,
    PretrainConfig,
    Recipe,
)
from hemoco.data.shards.index import ShardIndexes
from hemoco.results.records import run_results
from hemoco.storage.objects import join_url
from hemoco.tracking.client import connect
from hemoco.tracking.runs import find_run, read_artifacts
from pipeline.run import transfer_only
from tests.helpers.whole_stages import pack

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ENCODER = EncoderConfig(architecture="test_resnet")
SMALL = {
    "inits": ("pretrained",),
    "lr": 0.06,
    "global_batch_size": 4,
    "reference_batch_size": 4,
    "warmup_steps": 20,
    "train_sizes": (112, 128, 144),
    "test_size": 128,
    "max_size": 200,
    "anchor_sizes": (8, 16, 24, 32, 64),
    "fpn_channels": 64,
    "box_features": 256,
    "rois_per_image": 64,
    "proposals": 200,
    "precise_bn_steps": 10,
}


@pytest.fixture(scope="module")
def recipe(ray_cluster, s3, test_data, coco_sets):
    sources = {"bccd": test_data / "bccd", "polygons": coco_sets["polygons"]}
    urls = {name: join_url(s3, "detection-learning", name) for name in sources}
    for name, folder in sources.items():
        pack((str(folder),), urls[name], split="train", samples_per_shard=10, seed=0)
    cells = DataConfig(shards=urls["bccd"], test_split="val")
    shapes = DataConfig(shards=urls["polygons"], test_split="train")
    return Recipe(
        name="detection_learning",
        data=cells,
        pretrain=PretrainConfig(encoder=ENCODER),
        transfers={
            "cells": FasterRcnnConfig(data=cells, metric="voc", steps=150, **SMALL),
            "shapes": MaskRcnnConfig(data=shapes, steps=100, **SMALL),
        },
    )


def test_detectors_find_cells_and_shapes(recipe, s3, tracking):
    url = join_url(s3, "detection-learning", "random.safetensors")
    backbone = random_backbone(ENCODER, 0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    export_backbone(backbone, url, {"data_digest": "", "run_id": ""})
    storage = join_url(s3, "detection-learning", "runs")
    transfer_only(
        recipe,
        indexes=ShardIndexes(),
        backbone_url=url,
        run="detection-learning",
        storage=storage,
        fresh=False,
        tags={},
    )
    rows = {row.transfer: row for row in run_results(tracking, "detection-learning").rows}
    assert (rows["cells"].metric, rows["shapes"].metric) == ("box_ap50", "mask_ap")
    assert rows["cells"].value > 0.2
    facts = {
        name: find_run(
            tracking,
            connect(tracking),
            {"hemoco.run": "detection-learning", "hemoco.transfer": name},
        )
        for name in rows
    }
    assert facts["shapes"].metrics["pretrained/seed_0/mask_ap50"] > 0.2
    for name in rows:
        files = read_artifacts(tracking, facts[name].run_id, "")
        assert {
            "pretrained_seed_0_detections.png",
            "pretrained_seed_0_predictions.json",
        } <= files.keys()
