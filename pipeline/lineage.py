"""Lineage in MLflow's terms: which backbone came of which data and pretraining, and which transfers measured it."""

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
    """The logged models of the backbones that a run's transfers start from; those given by URL are recorded here."""

    def __init__(self, study: Study, pretrained: str, url: str) -> None:
        """Takes the id of the model that `pretrained` stands for, and the URL of its file."""
        self._study, self._pretrained = study, pretrained
        self._known = {url: pretrained}
        self._lock = threading.Lock()  # transfers are threads, and one file is one model

    def tags(self, config: TransferConfig) -> dict[str, str]:
        """Tags `hemoco.model/INIT` for a transfer's run; a random or supervised init is no backbone in MLflow."""
        tags = {}
        for init in config.inits:
            url = init_url(init)
            if init == PRETRAINED:
                tags[f"{Tag.MODEL_PREFIX}{init}"] = self._pretrained
            elif url:
                with self._lock:
                    if url not in self._known:
                        self._known[url] = record_given(self._study, url)
                tags[f"{Tag.MODEL_PREFIX}{init_label(init)}"] = self._known[url]
        return tags


def record_pretrained(study: Study, run_id: str, url: str) -> str:
    """Records the backbone of a finished pretraining and registers it, once.

    It becomes a version of `hemoco-RECIPE`: what differs between its versions is data, settings and luck, while another
    architecture under the name that somebody loads would be a surprise. Its alias is the run's name.

    Args:
        study: the run.
        run_id: of the pretraining in MLflow.
        url: of the backbone.

    Returns:
        The id of its logged model.
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
    """Records a backbone that the pretraining exported after so many epochs; returns its model's id."""
    return registry.record_snapshot(
        study.uri, study.experiment_id, url, _pretrained_record(study, run_id, url, epoch)
    )


def record_given(study: Study, url: str) -> str:
    """Records a backbone that another run pretrained, or that was imported, unless it is; returns its model's id."""
    about = backbone_metadata(url)
    tags = {
        name: about[name] for name in ("source", "source_sha256", "data_digest") if name in about
    }
    pretraining = _known_run(study.uri, about["run_id"])
    record = BackboneRecord(
        name=pretraining.tags.get(Tag.RUN, "") if pretraining else _file_name(url),
        run_id=pretraining.run_id if pretraining else "",
        step=int(pretraining.params.get("pretrain.epochs", "0")) if pretraining else 0,
        params={name: about[name] for name in ("architecture", "stem", "data_digest")},
        tags={f"hemoco.{name}": value for name, value in tags.items()},
        about=about,
    )
    return registry.record_backbone(study.uri, study.experiment_id, url, record)


def data_name(data: DataConfig) -> str:
    """What MLflow calls a data set: the last two parts of its URL, the same for whatever run reads it."""
    parts = urlsplit(data.shards)
    return "/".join(PurePosixPath(parts.netloc + unquote(parts.path)).parts[-2:]).lstrip("/")


def data_counts(index: ShardIndex) -> dict[str, int]:
    """What MLflow shows of a data set's size: samples of each split, and all bytes."""
    counts = {
        f"samples/{split}": sum(shard.samples for shard in index.split(split))
        for split in index.splits
    }
    shards = index.shards
    return counts | {
        "samples": sum(shard.samples for shard in shards),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "classes": len(index.classes or index.categories),
    }


def link_models(study: Study, run_id: str, tags: Mapping[str, str]) -> None:
    """Makes the backbones that a transfer's tags name inputs of its run."""
    registry.link_models(study.uri, run_id, _models(tags).values())


def log_results(
    study: Study, run_id: str, name: str, data: registry.Data, tags: Mapping[str, str]
) -> None:
    """Puts a transfer's headline on the pages of its backbones: the mean over the seeds, as TRANSFER/METRIC."""
    metric, metrics = tags[Tag.METRIC], tracking.run_facts(study.uri, run_id).metrics
    results = []
    for label, model_id in sorted(_models(tags).items(), key=lambda item: item[0] == PRETRAINED):
        values = seed_values(metrics, label, metric)
        if values:
            mean, step = sum(values) / len(values), int(tags.get(Tag.EPOCH, "0"))
            results.append(Measured(f"{name}/{metric}", mean, step, model_id))
    registry.log_results(study.uri, run_id, results, data)


def seed_values(metrics: Mapping[str, float], label: str, metric: str) -> list[float]:
    """The values of one init's seeds among a transfer's metrics."""
    wanted = re.compile(rf"{re.escape(label)}/seed_\d+/{re.escape(metric)}")
    return [value for key, value in metrics.items() if wanted.fullmatch(key)]


def _models(tags: Mapping[str, str]) -> dict[str, str]:
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
    """The pretraining, if it is in this MLflow; imported backbones have none."""
    if not run_id:
        return None
    try:
        return tracking.run_facts(uri, run_id)
    except RefusedError:
        return None


def _file_name(url: str) -> str:
    return PurePosixPath(unquote(urlsplit(url).path)).stem
