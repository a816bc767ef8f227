"""Checks of a recipe against its data that need neither Ray nor MLflow."""

import logging

from hemoco.backbones.file import backbone_metadata
from hemoco.backbones.inits import check_architecture, check_supervised
from hemoco.config import (
    ClassifierConfig,
    DataConfig,
    DetectionConfig,
    KnnConfig,
    PretrainConfig,
    Recipe,
    TransferConfig,
    init_url,
)
from hemoco.data.shards.index import ShardIndexes
from hemoco.data.stream.batches import pretraining_plan, steps_per_epoch
from hemoco.errors import ConfigError, ShardError, UsageError
from hemoco.storage.objects import check_url
from hemoco.train.advice import checkpoint_bytes, doubtful_settings
from hemoco.transfer.classification.classifier import classifier_plan
from hemoco.transfer.classification.knn import check_neighbours

logger = logging.getLogger(__name__)


def transfer_data(recipe: Recipe, config: TransferConfig) -> DataConfig:
    """A transfer's own data, or the recipe's where it names none."""
    return config.data if config.data.shards else recipe.data


def check_urls(recipe: Recipe) -> None:
    """Refuses paths: workers run in other folders and on other machines, where a relative path means nothing.

    Command lines may have paths, which become URLs when they are read (`jobs.options`).

    Raises:
        UsageError: the recipe names no shards, or a path instead of a URL.
    """
    if not recipe.data.shards:
        raise UsageError(
            "--data.shards is missing: name the folder or URL that `python -m jobs pack` wrote"
        )
    urls = {"data.shards": recipe.data.shards}
    for name, config in recipe.transfers.items():
        urls[f"transfers.{name}.data.shards"] = config.data.shards
        urls |= {f"transfers.{name}.inits": url for url in map(init_url, config.inits) if url}
    for name, url in urls.items():
        if url:
            check_url(name, url)


def check_pretraining(recipe: Recipe, indexes: ShardIndexes) -> None:
    """Finds what would make a pretraining fail later, in seconds and without Ray; settings that rarely work are logged.

    Args:
        recipe: with absolute URLs.
        indexes: of this command.

    Raises:
        UsageError: the recipe names no shards, or a path instead of a URL.
        ShardError: there are none, or not the splits it names.
        ConfigError: the recipe does not fit its data.
    """
    check_urls(recipe)
    data, index = recipe.data, indexes.at(recipe.data.shards)
    index.split(data.pretrain_split)
    steps = steps_per_epoch(index, data.pretrain_split, pretraining_plan(recipe.pretrain))
    for doubt in doubtful_settings(recipe.pretrain, steps):
        logger.warning("%s", doubt)
    _say_checkpoints(recipe.pretrain)
    if not recipe.pretrain.knn_every_epochs:
        return
    if not index.classes:
        raise ConfigError(
            f"pretrain.knn_every_epochs is {recipe.pretrain.knn_every_epochs} but {data.shards} has no labels: "
            "set it to 0"
        )
    for split in (data.train_split, data.test_split):
        index.split(split)


def check_transfers(recipe: Recipe, indexes: ShardIndexes) -> None:
    """Finds what would make the transfers fail later; arguments and errors are those of `check_pretraining`.

    Raises:
        CheckpointError: a file that an init names is no backbone.
    """
    check_urls(recipe)
    given = {
        url for config in recipe.transfers.values() for url in map(init_url, config.inits) if url
    }
    for url in sorted(given):
        check_architecture(url, backbone_metadata(url), recipe.pretrain.encoder)
    for name, config in recipe.transfers.items():
        if "supervised" in config.inits:
            check_supervised(recipe.pretrain.encoder)
        used = transfer_data(recipe, config)
        found = indexes.at(used.shards)
        for split in (used.train_split, used.test_split):
            try:
                found.split(split)
            except ShardError as error:
                raise ShardError(f"transfers.{name}: {used.shards}: {error}") from error
        if isinstance(config, ClassifierConfig):
            steps_per_epoch(found, used.train_split, classifier_plan(config, 0))
        if isinstance(config, KnnConfig):
            check_neighbours(
                config.neighbours, sum(shard.samples for shard in found.split(used.train_split))
            )
        if isinstance(config, DetectionConfig) and not found.categories:
            raise ConfigError(
                f"transfers.{name}: {used.shards} has no object categories; pack a COCO or VOC folder"
            )
        if not isinstance(config, DetectionConfig) and not found.classes:
            raise ConfigError(
                f"transfers.{name}: {used.shards} has no labels to measure by; pack class folders"
            )


def _say_checkpoints(config: PretrainConfig) -> None:
    kept = f"{config.keep_last} kept"
    if config.keep_every_steps:
        kept += f" and one every {config.keep_every_steps} steps"
    logger.info("a checkpoint takes %.2f GB, %s", checkpoint_bytes(config) / 1e9, kept)
