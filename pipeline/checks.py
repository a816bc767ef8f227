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
    """Returns a transfer's own data, or the recipe's if the transfer names none."""
    return config.data if config.data.shards else recipe.data


def check_urls(recipe: Recipe) -> None:
    """Refuses local paths, which workers in other folders and on other machines cannot resolve.

    Paths on a command line are allowed; they become URLs when it is parsed (`jobs.options`).

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
    for setting, url in urls.items():
        if url:
            check_url(setting, url)


def check_pretraining(recipe: Recipe, indexes: ShardIndexes) -> None:
    """Checks, within seconds and without Ray, that a recipe's pretraining fits its data.

    Settings that rarely work are logged as warnings.

    Args:
        recipe: the recipe, with absolute URLs.
        indexes: shard indexes that this command has read.

    Raises:
        UsageError: the recipe names no shards, or a path instead of a URL.
        ShardError: there are no shards, or a split that the recipe names is missing.
        ConfigError: the recipe does not fit its data.
    """
    check_urls(recipe)
    data, index = recipe.data, indexes.at(recipe.data.shards)
    index.split(data.pretrain_split)
    steps = steps_per_epoch(index, data.pretrain_split, pretraining_plan(recipe.pretrain))
    for warning in doubtful_settings(recipe.pretrain, steps):
        logger.warning("%s", warning)
    _log_checkpoint_size(recipe.pretrain)
    if not recipe.pretrain.knn_every_epochs:
        return
    if not index.classes:
        raise ConfigError(
            f"pretrain.knn_every_epochs is {recipe.pretrain.knn_every_epochs} "
            f"but {data.shards} has no labels: set it to 0"
        )
    for split in (data.train_split, data.test_split):
        index.split(split)


def check_transfers(recipe: Recipe, indexes: ShardIndexes) -> None:
    """Checks that a recipe's transfers fit their data and their backbones.

    Arguments and errors are those of `check_pretraining`, with one more error.

    Raises:
        CheckpointError: a file that an init names is not a backbone.
    """
    check_urls(recipe)
    backbone_urls: set[str] = set()
    for config in recipe.transfers.values():
        backbone_urls.update(url for url in map(init_url, config.inits) if url)
    for url in sorted(backbone_urls):
        check_architecture(url, backbone_metadata(url), recipe.pretrain.encoder)
    for name, config in recipe.transfers.items():
        if "supervised" in config.inits:
            check_supervised(recipe.pretrain.encoder)
        data = transfer_data(recipe, config)
        index = indexes.at(data.shards)
        for split in (data.train_split, data.test_split):
            try:
                index.split(split)
            except ShardError as error:
                raise ShardError(f"transfers.{name}: {data.shards}: {error}") from error
        if isinstance(config, ClassifierConfig):
            # raises ConfigError where the split is smaller than a batch
            steps_per_epoch(index, data.train_split, classifier_plan(config, 0))
        if isinstance(config, KnnConfig):
            samples = sum(shard.samples for shard in index.split(data.train_split))
            check_neighbours(config.neighbours, samples)
        if isinstance(config, DetectionConfig) and not index.categories:
            raise ConfigError(
                f"transfers.{name}: {data.shards} has no object categories; "
                "pack a COCO or VOC folder"
            )
        if not isinstance(config, DetectionConfig) and not index.classes:
            raise ConfigError(
                f"transfers.{name}: {data.shards} has no labels to measure by; pack class folders"
            )


def _log_checkpoint_size(config: PretrainConfig) -> None:
    kept = f"{config.keep_last} kept"
    if config.keep_every_steps:
        kept += f" and one every {config.keep_every_steps} steps"
    logger.info("a checkpoint takes %.2f GB, %s", checkpoint_bytes(config) / 1e9, kept)
