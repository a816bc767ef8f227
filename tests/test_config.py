import dataclasses

import pytest

from hemoco.config import (
    DataConfig,
    FineTuneConfig,
    Recipe,
    StreamConfig,
    config_difference,
    config_digest,
    flat_params,
)

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
