import dataclasses

import pytest

from hemoco.config import (
    DataConfig,
    FasterRcnnConfig,
    FineTuneConfig,
    KnnConfig,
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
        {"stream": StreamConfig(workers=7, memory_bytes=1, disk_cache_bytes=2, retry_s=3, max_bad_share=0.5)},
    ],
)
def test_where_and_how_fast_a_transfer_runs_does_not_make_it_another(settings: dict[str, object]) -> None:
    other = changed(**settings)
    assert config_digest(other) == config_digest(RECIPE)
    assert config_difference(flat_params(RECIPE), flat_params(other)) == []
    old, new = (flat_params({"transfer": recipe.transfers["whole"]}) for recipe in (RECIPE, other))
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
def test_what_would_fail_late_is_refused_by_name(kind: type, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"\.{named} "):
        kind(**settings)
