import dataclasses
import re
from collections.abc import Iterator

import pytest

from hemoco.config import (
    DataConfig,
    FasterRcnnConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    MaskRcnnConfig,
    Recipe,
    StreamConfig,
    config_difference,
    config_digest,
    flat_params,
)
from hemoco.errors import ConfigError

RECIPE = Recipe(name="r", transfers={"whole": FineTuneConfig()})


def changed(**settings: object) -> Recipe:
    transfer = dataclasses.replace(RECIPE.transfers["whole"], **settings)  # type: ignore[arg-type]
    return dataclasses.replace(RECIPE, transfers={"whole": transfer})


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 4, "cpus": 2, "gpus": 1},
        {"log_every_steps": 1, "checkpoint_every_steps": 5},
        {
            "stream": StreamConfig(
                workers=7, memory_bytes=1, disk_cache_bytes=2, retry_s=3, max_bad_share=0.5
            )
        },
    ],
)
def test_where_and_how_fast_a_transfer_runs_does_not_make_it_another(
    settings: dict[str, object],
) -> None:
    other = changed(**settings)
    assert config_digest(other) == config_digest(RECIPE)
    assert config_difference(flat_params(RECIPE), flat_params(other)) == []
    old = flat_params({"transfer": RECIPE.transfers["whole"]})  # as in a transfer's checkpoint
    new = flat_params({"transfer": other.transfers["whole"]})
    assert config_difference(old, new) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1.0},
        {"global_batch_size": 512},
        {"seeds": (0, 1)},
        {"stream": StreamConfig(lanes=8)},
        {"data": DataConfig(shards="s3://b/other")},
    ],
)
def test_what_changes_a_result_makes_it_another(settings: dict[str, object]) -> None:
    other = changed(**settings)
    assert config_digest(other) != config_digest(RECIPE)
    (line,) = config_difference(flat_params(RECIPE), flat_params(other))
    assert line.startswith("transfers.whole.")


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        (KnnConfig, {"neighbours": 0}, "neighbours"),
        (KnnConfig, {"temperature": 0.0}, "temperature"),
        (KnnConfig, {"seeds": (-1,)}, "seeds"),
        (KnnConfig, {"seeds": (1, 1)}, "seeds"),
        (KnnConfig, {"data": DataConfig(test_split="val")}, "data"),
        (LinearProbeConfig, {"lrs": ()}, "lrs"),
        (LinearProbeConfig, {"weight_decays": (-1.0,)}, "weight_decays"),
        (LowShotConfig, {"fraction": 1.0}, "fraction"),
        (FineTuneConfig, {"warmup_epochs": -1}, "warmup_epochs"),
        (FineTuneConfig, {"crop_scale": (0.0, 3.0)}, "crop_scale"),
        (FineTuneConfig, {"flip": 2.0}, "flip"),
        (FineTuneConfig, {"resize": 10}, "resize"),
        (FineTuneConfig, {"layer_decay": 0.0}, "layer_decay"),
        (FineTuneConfig, {"workers": 3}, "global_batch_size"),
        (FasterRcnnConfig, {"warmup_steps": -1}, "warmup_steps"),
        (FasterRcnnConfig, {"proposals": 0}, "proposals"),
        (FasterRcnnConfig, {"train_sizes": (0,)}, "train_sizes"),
        (FasterRcnnConfig, {"milestones": (2.0,)}, "milestones"),
        (FasterRcnnConfig, {"anchor_sizes": (8, 16)}, "anchor_sizes"),
        (MaskRcnnConfig, {"metric": "voc"}, "metric"),
    ],
)
def test_what_would_fail_late_is_refused_by_name(
    kind: type, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"\.{named} "):
        kind(**settings)


def closed_choices(config: object, name: str = "") -> Iterator[str]:
    """Dotted names of a config's settings that have a closed list of values."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from closed_choices(value, f"{name}.{key}")
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            if str(field.type).startswith(("Literal", "typing.Literal")):
                yield f"{name}.{field.name}".lstrip(".")
            yield from closed_choices(getattr(config, field.name), f"{name}.{field.name}")


EVERY_KIND = Recipe(
    name="r",
    transfers={
        "knn": KnnConfig(),
        "probe": LinearProbeConfig(),
        "few": LowShotConfig(fraction=0.1),
        "linear": LinearClassifierConfig(),
        "whole": FineTuneConfig(),
        "boxes": FasterRcnnConfig(),
    },
)


def with_setting(config: object, path: list[str], value: object) -> object:
    """The config with one setting replaced."""
    name, *rest = path
    if isinstance(config, dict):
        return {**config, name: with_setting(config[name], rest, value)}
    inner = with_setting(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})  # type: ignore[type-var]


@pytest.mark.parametrize("name", list(closed_choices(EVERY_KIND)))
def test_a_value_that_is_not_in_the_list_of_its_setting_is_refused_by_its_full_name(
    name: str,
) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(name)} is 'nonsense': it must be \w+ or "):
        with_setting(EVERY_KIND, name.split("."), "nonsense")
