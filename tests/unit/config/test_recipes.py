"""The shipped recipes against the table of the official ones (docs/official-recipes.md)."""

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
"""Recipes that nobody has published."""
TRANSFERS = {name for name in recipe_names() if name.startswith("transfer_")}
"""Recipes whose pretraining is somebody else's: see test_transfer_recipes.py."""
IMAGENET = [name for name in recipe_names() if name.startswith("imagenet")]


PRETRAINING, AUGMENTATION, *_ = read_tables("official-recipes.md")
TABLE = {row["recipe"]: row for row in PRETRAINING}


@pytest.mark.parametrize("name", TABLE)
def test_constants_are_those_of_the_official_recipe(name: str) -> None:
    config, row = load_recipe(name).pretrain, TABLE[name]
    optimizer, moco = config.optimizer, config.moco
    words = [
        optimizer.kind,
        optimizer.schedule,
        config.precision,
        "yes" if config.encoder.zero_init_last else "no",
    ]
    assert words == [row["optimizer"], row["schedule"], row["precision"], row["zero init"]]
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
    assert row.keys() == {"recipe", "optimizer", "schedule", "precision", "zero init", *numbers}
    assert optimizer.momentum == 0.9 and optimizer.trust == 0.001


def test_every_official_recipe_is_in_the_table() -> None:
    assert {name for name in recipe_names() if name.startswith("imagenet")} < TABLE.keys()


@pytest.mark.parametrize("name", IMAGENET)
def test_every_imagenet_recipe_has_the_data_settings_of_the_official_one(name: str) -> None:
    views, encoder = load_recipe(name).pretrain.views, load_recipe(name).pretrain.encoder
    assert (views.size, views.crop_scale, views.flip, views.grayscale) == (
        224,
        (0.2, 1.0),
        0.5,
        0.2,
    )
    assert (views.mean, views.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (encoder.architecture, encoder.stem, encoder.init, encoder.fan_mode) == (
        *("resnet50", "imagenet", "kaiming", "fan_out"),
    )


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
    v1, v2, cifar = (
        load_recipe(name).pretrain.moco
        for name in (
            "imagenet_resnet50_mocov1",
            "imagenet_resnet50_mocov2",
            "cifar10_resnet18_mocov2",
        )
    )
    assert (
        isinstance(v1, MoCoConfig) and isinstance(v2, MoCoConfig) and isinstance(cifar, MoCoConfig)
    )
    assert (v1.head, v1.queue_length, v1.bn_group_size) == ("linear", 65536, 32)
    assert (v2.head, v2.queue_length, v2.bn_group_size) == ("mlp", 65536, 32)
    assert (cifar.head, cifar.queue_length, cifar.bn_group_size) == (
        "linear",
        4096,
        64,
    )  # 8 groups of a batch of 512
    v3 = load_recipe("imagenet_resnet50_mocov3_100ep").pretrain.moco
    assert isinstance(v3, MoCoV3Config) and v3.hidden_size == 4096


@pytest.mark.parametrize(
    ("name", "epoch", "lr"),
    [
        *[
            ("imagenet_resnet50_mocov1", e, lr)
            for e, lr in ((119, 0.03), (120, 0.003), (160, 0.0003))
        ],
        *[
            ("imagenet_resnet50_mocov2", e, lr)
            for e, lr in ((0, 0.03), (100, 0.015), (199, 1.85e-6))
        ],
        *[
            ("imagenet_resnet50_mocov3_100ep", e, lr)
            for e, lr in ((0, 0), (5, 4.8), (10, 9.6), (55, 4.8))
        ],
    ],
)
def test_learning_rates_are_the_tables(name: str, epoch: int, lr: float) -> None:
    config = load_recipe(name).pretrain
    found = learning_rate(
        config.optimizer, step=epoch * 312, steps_per_epoch=312, epochs=config.epochs
    )
    assert found == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize(("epoch", "momentum"), [(0, 0.99), (50, 0.995), (100, 1.0)])
def test_momentum_of_v3_is_the_tables(epoch: int, momentum: float) -> None:
    config = load_recipe("imagenet_resnet50_mocov3_100ep").pretrain
    assert key_momentum(config.moco, step=epoch * 312, total_steps=31_200) == pytest.approx(
        momentum
    )


def reduced(config: PretrainConfig) -> PretrainConfig:
    """A recipe with all its constants at a batch of 8 images of 32 pixels; float16 is bfloat16, which CPUs can do."""
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
    before = [parameter.clone() for parameter in state.model.query_encoder.parameters()]
    state.step = 1  # at step 0 a warm-up's learning rate is 0
    (metrics,) = train_steps(state, [Batch(crops, ["k"] * 8, StreamPosition(0, 1))], 100)
    assert math.isfinite(metrics.values["loss"]) and metrics.values["lr"] > 0
    names = [name for name, _ in state.model.query_encoder.named_parameters()]
    after = dict(state.model.query_encoder.named_parameters())
    moved = {
        name for name, old in zip(names, before, strict=True) if not torch.equal(old, after[name])
    }
    # behind a last BN of zeros a block's convolutions have no gradient yet
    outside = {n for n in names if not n.startswith("encoder.layer") or ".downsample." in n}
    assert moved >= (outside if config.encoder.zero_init_last else set(names))
    assert name in OURS | TABLE.keys() or name.startswith("cifar10_resnet18")
