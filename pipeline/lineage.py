"""Lineage in MLflow: the data and pretraining of each backbone, and the transfers that measured it.

Backbones are logged models of MLflow. They are outputs of their pretraining's run and inputs of the
transfers' runs, and a finished pretraining's backbone is a registered version as well.
"""

import logging
import re
import threading
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from hemoco.backbones.file import backbone_metadata
from hemoco.config import DataConfig, TransferConfig, init_label, init_url
from hemoco.config.kinds import method_name
from hemoco.data.shards.index import ShardIndex
from hemoco.errors import RefusedError
from hemoco.results.records import PRETRAINED
from hemoco.tracking import models as registry
from hemoco.tracking import runs as tracking
from hemoco.tracking.models import BackboneRecord, Measured
from hemoco.tracking.tags import Tag
from pipeline.open_run import Study

logger = logging.getLogger(__name__)


class BackboneModels:
    """The logged models of the backbones that a run's transfers start from.

    Backbones given by URL are logged when a transfer first uses them.

    Args:
        study: the run.
        pretrained: id of the model that the init `pretrained` stands for.
        url: URL of that model's file.
    """

    def __init__(self, study: Study, pretrained: str, url: str) -> None:
        self._study, self._pretrained = study, pretrained
        self._id_of_url = {url: pretrained}
        # transfers run in threads, and two of them must not log one file as two models
        self._lock = threading.Lock()

    def tags(self, config: TransferConfig) -> dict[str, str]:
        """Returns the tags `hemoco.model/INIT` of a transfer's run.

        Random and supervised inits have none: they are no backbones in MLflow.
        """
        tags = {}
        for init in config.inits:
            url = init_url(init)
            if init == PRETRAINED:
                tags[f"{Tag.MODEL_PREFIX}{init}"] = self._pretrained
            elif url:
                with self._lock:
                    if url not in self._id_of_url:
                        self._id_of_url[url] = record_given(self._study, url)
                tags[f"{Tag.MODEL_PREFIX}{init_label(init)}"] = self._id_of_url[url]
        return tags


def record_pretrained(study: Study, run_id: str, url: str) -> str:
    """Logs the backbone of a finished pretraining as a model and registers it, once.

    It becomes a version of the registered model `hemoco-RECIPE`, with the run's name as its alias.
    Versions of one model may differ in data, settings and seed. `--pretrain.encoder` flags can
    even give them different architectures, which their tag `Tag.ARCHITECTURE` names.

    Args:
        study: the run.
        run_id: MLflow's id of the pretraining.
        url: URL of the backbone.

    Returns:
        The id of the logged model.
    """
    known = tracking.run_facts(study.uri, run_id).tags.get(Tag.MODEL_ID)
    if known:
        return known
    record = _pretrained_record(study, run_id, url, study.recipe.pretrain.epochs)
    model_id = registry.record_backbone(study.uri, study.experiment_id, url, record)
    name, alias = registry.models_name(study.recipe.name), registry.alias_name(study.run)
    tags = record.tags | {Tag.ARCHITECTURE: record.params["architecture"], Tag.BACKBONE_URL: url}
    version = registry.register_version(study.uri, model_id, name, alias, tags)
    tracking.set_tags(study.uri, run_id, {Tag.MODEL_ID: model_id})
    logger.info(
        "backbone is models:/%s/%s in MLflow, also models:/%s@%s", name, version, name, alias
    )
    return model_id


def record_snapshot(study: Study, run_id: str, url: str, epoch: int) -> str:
    """Logs a backbone that the pretraining exported after an epoch; returns its model's id."""
    return registry.record_snapshot(
        study.uri, study.experiment_id, url, _pretrained_record(study, run_id, url, epoch)
    )


def record_given(study: Study, url: str) -> str:
    """Logs a backbone of another run, or an imported one, unless it is logged; returns its id."""
    about = backbone_metadata(url)
    name, run_id, epochs = PurePosixPath(unquote(urlsplit(url).path)).stem, "", 0
    pretraining = _known_run(study.uri, about["run_id"])
    if pretraining is not None:
        name, run_id = pretraining.tags.get(Tag.RUN, ""), pretraining.run_id
        epochs = int(pretraining.params.get("pretrain.epochs", "0"))
    record = BackboneRecord(
        name=name,
        run_id=run_id,
        step=epochs,
        params={key: about[key] for key in ("architecture", "stem", "data_digest")},
        tags={
            f"hemoco.{key}": about[key]
            for key in ("source", "source_sha256", "data_digest")
            if key in about
        },
        about=about,
    )
    return registry.record_backbone(study.uri, study.experiment_id, url, record)


def data_name(data: DataConfig) -> str:
    """Returns the name of a data set in MLflow, the last two parts of its URL."""
    parts = urlsplit(data.shards)
    return "/".join(PurePosixPath(parts.netloc + unquote(parts.path)).parts[-2:]).lstrip("/")


def data_counts(index: ShardIndex) -> dict[str, int]:
    """Returns the sizes of a data set for MLflow: samples, shards, bytes, classes or categories."""
    counts = {}
    for split in index.splits:
        counts[f"samples/{split}"] = sum(shard.samples for shard in index.split(split))
    counts["samples"] = sum(shard.samples for shard in index.shards)
    counts["shards"] = len(index.shards)
    counts["bytes"] = sum(shard.bytes for shard in index.shards)
    counts["classes"] = len(index.classes or index.categories)
    return counts


def link_models(study: Study, run_id: str, tags: Mapping[str, str]) -> None:
    """Makes the backbones that a transfer's tags name inputs of its run."""
    registry.link_models(study.uri, run_id, _model_ids(tags).values())


def log_results(
    study: Study, run_id: str, name: str, data: registry.Data, tags: Mapping[str, str]
) -> None:
    """Logs a transfer's headline metric on its backbones' pages in MLflow.

    The metric is the mean over the seeds, under the name TRANSFER/METRIC.

    Args:
        study: the run.
        run_id: MLflow's id of the transfer.
        name: name of the transfer in the recipe.
        data: the data that it measured on.
        tags: tags of the transfer's run.
    """
    metric = tags[Tag.METRIC]
    metrics = tracking.run_facts(study.uri, run_id).metrics
    # The pretrained backbone comes last: the transfer's own run shows the last value of a key.
    ordered = sorted(_model_ids(tags).items(), key=lambda item: item[0] == PRETRAINED)
    results = []
    for label, model_id in ordered:
        values = seed_values(metrics, label, metric)
        if values:
            mean = sum(values) / len(values)
            epoch = int(tags.get(Tag.EPOCH, "0"))
            results.append(Measured(f"{name}/{metric}", mean, epoch, model_id))
    registry.log_results(study.uri, run_id, results, data)


def seed_values(metrics: Mapping[str, float], label: str, metric: str) -> list[float]:
    """Returns the values of one init's seeds among a transfer's metrics."""
    key_pattern = re.compile(rf"{re.escape(label)}/seed_\d+/{re.escape(metric)}")
    return [value for key, value in metrics.items() if key_pattern.fullmatch(key)]


def _model_ids(tags: Mapping[str, str]) -> dict[str, str]:
    return {
        tag.removeprefix(Tag.MODEL_PREFIX): value
        for tag, value in tags.items()
        if tag.startswith(Tag.MODEL_PREFIX)
    }


def _pretrained_record(study: Study, run_id: str, url: str, epochs: int) -> BackboneRecord:
    pretrain, digest = study.recipe.pretrain, study.data.digest
    return BackboneRecord(
        name=study.run,
        run_id=run_id,
        step=epochs,
        params={
            "architecture": pretrain.encoder.architecture,
            "stem": pretrain.encoder.stem,
            "method": method_name(study.recipe.pretrain.moco),
            "data_digest": digest,
            "epochs": str(epochs),
            "image_size": str(pretrain.views.size),
        },
        tags={Tag.RUN: study.run, Tag.RECIPE: study.recipe.name, Tag.DATA_DIGEST: digest},
        about=backbone_metadata(url),
    )


def _known_run(uri: str, run_id: str) -> tracking.RunFacts | None:
    """Returns the pretraining's run if this MLflow has it; an imported backbone has none."""
    if not run_id:
        return None
    try:
        return tracking.run_facts(uri, run_id)
    except RefusedError:
        return None
