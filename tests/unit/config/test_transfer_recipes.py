"""Recipes of transfers, compared with the tables of the official ones in official-recipes.md."""

import pytest

from hemoco.config import DetectionConfig, LinearClassifierConfig, MaskRcnnConfig
from jobs.options import load_recipe, recipe_names
from tests.helpers.docs_tables import read_tables

*_, LINEAR, DETECTION = read_tables("official-recipes.md")


@pytest.mark.parametrize("row", LINEAR, ids=[row["transfer"] for row in LINEAR])
def test_linear_protocols(row: dict[str, str]) -> None:
    config = load_recipe("transfer_imagenet").transfers[row["transfer"]]
    assert isinstance(config, LinearClassifierConfig)
    assert (config.epochs, config.global_batch_size) == (int(row["epochs"]), int(row["batch"]))
    assert (config.lr, config.schedule) == (float(row["lr"]), row["schedule"])
    assert (config.weight_decay, config.warmup_epochs, config.flip) == (0.0, 0, 0.5)
    assert (config.size, config.resize, config.crop_scale) == (224, 256, (0.08, 1.0))


@pytest.mark.parametrize("row", DETECTION, ids=[row["transfer"] for row in DETECTION])
def test_detection_protocols(row: dict[str, str]) -> None:
    config = load_recipe(row["recipe"]).transfers[row["transfer"]]
    assert isinstance(config, DetectionConfig)
    assert (config.architecture, config.metric) == (row["architecture"], row["metric"])
    assert (config.steps, config.warmup_steps) == (int(row["steps"]), int(row["warmup steps"]))
    drops = [int(step) for step in row["lr drops at"].split(",")]
    assert [round(share * config.steps) for share in config.milestones] == drops
    smallest, largest = map(int, row["shortest side"].split(" to "))
    assert config.train_sizes == tuple(range(smallest, largest + 1, 32))
    assert (config.global_batch_size, config.reference_batch_size) == (16, 16)
    assert (config.lr, config.weight_decay) == (0.02, 1e-4)
    assert (config.test_size, config.max_size) == (800, 1333)
    assert (config.precise_bn_steps, config.max_detections) == (200, 100)
    assert isinstance(config, MaskRcnnConfig) == (row["metric"] == "coco")


def test_every_recipe_of_transfers_is_tested_here() -> None:
    named = {name for name in recipe_names() if name.startswith("transfer_")}
    assert named == {"transfer_coco", "transfer_imagenet", "transfer_voc"}
    assert {row["transfer"] for row in LINEAR} <= load_recipe("transfer_imagenet").transfers.keys()
    for recipe in ("transfer_voc", "transfer_coco"):
        rows = {row["transfer"] for row in DETECTION if row["recipe"] == recipe}
        assert rows == load_recipe(recipe).transfers.keys()
    assert load_recipe("transfer_voc").data.train_split == "train+val"
