"""Recipes of transfers against the tables of the official ones (../shared/reference/ssl.md, sections 2.2 and 2.3)."""

import pytest

from hemoco.config import DetectionConfig, LinearClassifierConfig, MaskRcnnConfig
from jobs.options import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "schedule"),
    [("linear", 100, 256, 30.0, "step"), ("linear_v3", 90, 1024, 0.4, "cosine")],
)
def test_linear_protocols(name: str, epochs: int, batch: int, lr: float, schedule: str) -> None:
    config = load_recipe("transfer_imagenet").transfers[name]
    assert isinstance(config, LinearClassifierConfig)
    assert (config.epochs, config.global_batch_size, config.lr, config.schedule) == (epochs, batch, lr, schedule)
    assert (config.weight_decay, config.warmup_epochs, config.flip) == (0.0, 0, 0.5)
    assert (config.size, config.resize, config.crop_scale) == (224, 256, (0.08, 1.0))


@pytest.mark.parametrize(
    ("recipe", "name", "architecture", "steps", "drops", "warmup", "sizes", "metric"),
    [
        ("transfer_voc", "c4_24k", "c4", 24_000, (18_000, 22_000), 100, range(480, 801, 32), "voc07"),
        ("transfer_coco", "c4_1x", "c4", 90_000, (60_000, 80_000), 1000, range(640, 801, 32), "coco"),
        ("transfer_coco", "c4_2x", "c4", 180_000, (120_000, 160_000), 1000, range(640, 801, 32), "coco"),
        ("transfer_coco", "fpn_1x", "fpn", 90_000, (60_000, 80_000), 1000, range(640, 801, 32), "coco"),
        ("transfer_coco", "fpn_2x", "fpn", 180_000, (120_000, 160_000), 1000, range(640, 801, 32), "coco"),
    ],
)
def test_detection_protocols(
    recipe: str,
    name: str,
    architecture: str,
    steps: int,
    drops: tuple[int, ...],
    warmup: int,
    sizes: range,
    metric: str,
) -> None:
    config = load_recipe(recipe).transfers[name]
    assert isinstance(config, DetectionConfig)
    assert (config.architecture, config.steps, config.warmup_steps, config.metric) == (
        *(architecture, steps, warmup, metric),
    )
    assert [round(share * steps) for share in config.milestones] == list(drops)
    assert config.train_sizes == tuple(sizes)
    assert (config.global_batch_size, config.reference_batch_size, config.lr, config.weight_decay) == (
        16,
        16,
        0.02,
        1e-4,
    )
    assert (config.test_size, config.max_size, config.precise_bn_steps, config.max_detections) == (800, 1333, 200, 100)
    assert isinstance(config, MaskRcnnConfig) == (metric == "coco")


def test_every_recipe_of_transfers_is_tested_here() -> None:
    named = {name for name in recipe_names() if name.startswith("transfer_")}
    assert named == {"transfer_coco", "transfer_imagenet", "transfer_voc"}
    assert len(load_recipe("transfer_voc").transfers) == 1 and len(load_recipe("transfer_coco").transfers) == 4
    assert load_recipe("transfer_voc").data.train_split == "train+val"
