"""The shipped recipes, compared with the tables of official ones in docs/official-recipes.md."""

import dataclasses
import math

import pytest
import torch

from hemoco.config import MoCoConfig, MoCoV3Config, PretrainConfig, ResourcesConfig, StreamConfig
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.train.optim import key_momentum, learning_rate
from hemoco.train.pretrain import build_state, train_steps
from jobs.options import load_recipe, recipe_names
from tests.helpers.docs_tables import read_tables

OURS = {"demo", "degradation", "initialisation"}
"""Recipes without a published counterpart."""
TRANSFERS = {name for name in recipe_names() if name.startswith("transfer_")}
"""Recipes of transfers alone: see test_transfer_recipes.py."""
IMAGENET = [name for name in recipe_names() if name.startswith("imagenet")]


PRETRAINING, AUGMENTATION, *_ = read_tables("official-recipes.md")
TABLE = {row["recipe"]: row for row in PRETRAINING}


@pytest.mark.parametrize("name", TABLE)
def test_constants_are_those_of_the_official_recipe(name: str) -> None:
    config, row = load_recipe(name).pretrain, TABLE[name]
    optimizer, moco = config.optimizer, config.moco
    choices = {
        "optimizer": optimizer.kind,
        "schedule": optimizer.schedule,
        "precision": config.precision,
        "zero init": "yes" if config.encoder.zero_init_last else "no",
    }
    assert choices == {column: row[column] for column in choices}
    numbers = {
        "epochs": config.epochs,
        "batch": config.global_batch_size,
        "lr": optimizer.lr,
        "weight decay": optimizer.weight_decay,
        "warmup epochs": optimizer.warmup_epochs,
        "momentum": moco.momentum,
        "temperature": moco.temperature,
        "embedding": moco.embedding_size,
    }
    assert numbers == {column: pytest.approx(float(row[column]), rel=1e-9) for column in numbers}
    assert row.keys() == {"recipe", *choices, *numbers}
    assert optimizer.momentum == 0.9 and optimizer.trust == 0.001


def test_every_official_recipe_is_in_the_table() -> None:
    assert {name for name in recipe_names() if name.startswith("imagenet")} < TABLE.keys()


@pytest.mark.parametrize("name", IMAGENET)
def test_every_imagenet_recipe_has_the_data_settings_of_the_official_one(name: str) -> None:
    views, encoder = load_recipe(name).pretrain.views, load_recipe(name).pretrain.encoder
    assert views.size == 224
    assert views.crop_scale == (0.2, 1.0)
    assert (views.flip, views.grayscale) == (0.5, 0.2)
    assert (views.mean, views.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (encoder.architecture, encoder.stem) == ("resnet50", "imagenet")
    assert (encoder.init, encoder.fan_mode) == ("kaiming", "fan_out")


@pytest.mark.parametrize("row", AUGMENTATION, ids=[row["version"] for row in AUGMENTATION])
def test_augmentation_is_that_of_the_version(row: dict[str, str]) -> None:
    views = load_recipe(f"imagenet_resnet50_{row['version']}").pretrain.views
    numbers = {
        "jitter probability": views.jitter,
        "brightness": views.brightness,
        "contrast": views.contrast,
        "saturation": views.saturation,
        "hue": views.hue,
        "grey": views.grayscale,
        "blur of view 1": views.blur[0],
        "blur of view 2": views.blur[1],
        "solarize of view 2": views.solarize[1],
    }
    assert numbers == {column: float(row[column]) for column in numbers}
    assert row.keys() == {"version", "grey before jitter", *numbers}
    assert views.grayscale_first == (row["grey before jitter"] == "yes")
    assert views.solarize[0] == 0.0


def test_queue_head_and_groups_are_those_of_the_version() -> None:
    expected = {
        "imagenet_resnet50_mocov1": ("linear", 65536, 32),
        "imagenet_resnet50_mocov2": ("mlp", 65536, 32),
        "cifar10_resnet18_mocov2": ("linear", 4096, 64),  # 8 groups of a batch of 512
    }
    for name, settings in expected.items():
        moco = load_recipe(name).pretrain.moco
        assert isinstance(moco, MoCoConfig)
        assert (moco.head, moco.queue_length, moco.bn_group_size) == settings
    v3 = load_recipe("imagenet_resnet50_mocov3_100ep").pretrain.moco
    assert isinstance(v3, MoCoV3Config) and v3.hidden_size == 4096


@pytest.mark.parametrize(
    ("name", "epoch", "lr"),
    [
        ("imagenet_resnet50_mocov1", 119, 0.03),
        ("imagenet_resnet50_mocov1", 120, 0.003),
        ("imagenet_resnet50_mocov1", 160, 0.0003),
        ("imagenet_resnet50_mocov2", 0, 0.03),
        ("imagenet_resnet50_mocov2", 100, 0.015),
        ("imagenet_resnet50_mocov2", 199, 1.85e-6),
        ("imagenet_resnet50_mocov3_100ep", 0, 0),
        ("imagenet_resnet50_mocov3_100ep", 5, 4.8),
        ("imagenet_resnet50_mocov3_100ep", 10, 9.6),
        ("imagenet_resnet50_mocov3_100ep", 55, 4.8),
    ],
)
def test_learning_rates_are_the_tables(name: str, epoch: int, lr: float) -> None:
    config = load_recipe(name).pretrain
    ours = learning_rate(
        config.optimizer, step=epoch * 312, steps_per_epoch=312, epochs=config.epochs
    )
    assert ours == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize(("epoch", "momentum"), [(0, 0.99), (50, 0.995), (100, 1.0)])
def test_momentum_of_v3_is_the_tables(epoch: int, momentum: float) -> None:
    config = load_recipe("imagenet_resnet50_mocov3_100ep").pretrain
    ours = key_momentum(config.moco, step=epoch * 312, total_steps=31_200)
    assert ours == pytest.approx(momentum)


def reduced(config: PretrainConfig) -> PretrainConfig:
    """A recipe with all its constants, at a batch of 8 images of 32 pixels.

    float16 becomes bfloat16, which CPUs support.
    """
    moco = config.moco
    if isinstance(moco, MoCoConfig):
        moco = dataclasses.replace(moco, queue_length=16, bn_group_size=4)
    return dataclasses.replace(
        config,
        global_batch_size=8,
        precision="bfloat16" if config.precision == "float16" else config.precision,
        log_every_steps=1,
        views=dataclasses.replace(config.views, size=32),
        moco=moco,
        stream=StreamConfig(lanes=1),
        resources=ResourcesConfig(),
    )


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - TRANSFERS))
def test_every_recipe_takes_one_real_step(name: str) -> None:
    config = reduced(load_recipe(name).pretrain)
    state = build_state(config, torch.device("cpu"), data_digest="d")
    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(256, (8, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    before = {n: p.clone() for n, p in state.model.query_encoder.named_parameters()}
    state.step = 1  # at step 0 a warm-up's learning rate is 0
    (metrics,) = train_steps(state, [Batch(crops, ["k"] * 8, StreamPosition(0, 1))], 100)
    assert math.isfinite(metrics.values["loss"]) and metrics.values["lr"] > 0
    after = dict(state.model.query_encoder.named_parameters())
    changed = {
        name for name, parameter in after.items() if not torch.equal(parameter, before[name])
    }
    expected = set(after)
    if config.encoder.zero_init_last:
        # behind a last BN of zeros the convolutions of a block have no gradient yet
        expected = {n for n in after if not n.startswith("encoder.layer") or ".downsample." in n}
    assert changed >= expected
    assert name in OURS | TABLE.keys() or name.startswith("cifar10_resnet18")
