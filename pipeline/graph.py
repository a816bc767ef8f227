"""The graph: pretraining, then its transfers side by side, recorded in MLflow.

A run is its name. What MLflow says is finished is not done again; what is not goes on.
"""

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from hemoco import tracking
from hemoco.checkpoint import backbone_metadata
from hemoco.config import Recipe, TransferConfig
from hemoco.data.shards import read_index
from hemoco.errors import TrainingError, UsageError
from hemoco.storage import absolute_url, join_url
from pipeline.backbones import check_architecture
from pipeline.pretrain import Pretrained, PretrainJob, pretrain
from pipeline.study import (
    Study,
    closing_run,
    first_line,
    open_child,
    open_study,
    transfer_data,
)
from pipeline.transfer import headline_metric, measure_transfer
from pipeline.transfer_job import TransferJob

logger = logging.getLogger(__name__)


def pretrain_then_transfer(recipe: Recipe, *, run: str, storage: str, fresh: bool) -> None:
    """The whole way; the result is in MLflow, where `hemoco.comparison` reads it. `pipeline.study` checks before.

    Args:
        recipe: what to do.
        run: its identity; unfinished work under the same name goes on, finished work is kept.
        storage: URL of the folder that receives checkpoints and backbone.
        fresh: forget what is there under that name.

    Raises:
        UsageError: the name belongs to a run with other settings.
        TrainingError: a transfer failed; the others are finished and recorded.
    """
    study = open_study(recipe, run=run, storage=storage, fresh=fresh)
    try:
        done = _pretrain(study)
        _transfer_all(study, done.backbone_url, done.run_id)
    except BaseException:
        tracking.close_run(study.uri, study.parent_id, "FAILED")
        raise
    tracking.close_run(study.uri, study.parent_id, "FINISHED")


def pretrain_only(recipe: Recipe, *, run: str, storage: str, fresh: bool) -> Pretrained:
    """The first half of `pretrain_then_transfer`; a later `run` of the same name does the second. Checks as there."""
    return _pretrain(open_study(recipe, run=run, storage=storage, fresh=fresh))


def transfer_only(recipe: Recipe, *, backbone_url: str, run: str, storage: str, fresh: bool) -> None:
    """The second half of `pretrain_then_transfer`, from any backbone.

    Raises:
        UsageError: the run measures another backbone, or has other settings.
        CheckpointError: a backbone cannot be read.
        ConfigError: one is of another architecture than the recipe's.
    """
    backbone_url = absolute_url(backbone_url)
    check_architecture(backbone_url, recipe.pretrain.encoder)
    metadata = backbone_metadata(backbone_url)
    study = open_study(recipe, run=run, storage=storage, fresh=fresh)
    origin = {
        "hemoco.backbone_url": backbone_url,
        "hemoco.pretrain_run_id": metadata["run_id"],
        "hemoco.data_digest": metadata["data_digest"],
        **{f"hemoco.backbone_{name}": metadata[name] for name in ("source", "source_sha256") if name in metadata},
    }
    before = tracking.run_facts(study.uri, study.parent_id).tags.get("hemoco.backbone_url", backbone_url)
    if before != backbone_url:
        raise UsageError(
            f"run {run!r} measures another backbone ({before}): choose another --run name, or --fresh to start it anew"
        )
    tracking.set_tags(study.uri, study.parent_id, origin)
    _transfer_all(study, backbone_url, metadata["run_id"])
    tracking.close_run(study.uri, study.parent_id, "FINISHED")


def _pretrain(study: Study) -> Pretrained:
    """Pretrains, or takes up the finished pretraining of this run."""
    tags = {
        "hemoco.run": study.run,
        "hemoco.phase": "pretrain",
        "hemoco.recipe": study.recipe.name,
        "hemoco.data_digest": study.data.digest,
    }
    run_id, finished = open_child(study, "pretrain", tags)
    if finished is not None:
        return Pretrained(run_id=run_id, backbone_url=finished.tags["hemoco.backbone_url"], metrics=finished.metrics)
    data = study.recipe.data
    tracking.log_dataset_input(study.uri, run_id, study.recipe.name, data.shards, study.data.digest, "pretraining")
    job = PretrainJob(
        config=study.recipe.pretrain,
        data=data,
        url=join_url(study.url, "pretrain"),
        tracking_uri=study.uri,
        run_id=run_id,
    )
    with closing_run(study.uri, run_id):
        done = pretrain(job)
        tracking.set_tags(study.uri, run_id, {"hemoco.backbone_url": done.backbone_url})
    logger.info("pretrain done, backbone %s", done.backbone_url)
    return done


def _transfer_all(study: Study, backbone_url: str, pretrain_run_id: str) -> None:
    """All transfers side by side; every one is tried, then the failed ones are named.

    Raises:
        TrainingError: at least one failed.
    """
    transfers = study.recipe.transfers
    if not transfers:
        return
    with ThreadPoolExecutor(min(len(transfers), study.recipe.max_parallel_transfers)) as pool:
        futures = {
            name: pool.submit(_transfer, study, name, config, backbone_url, pretrain_run_id)
            for name, config in transfers.items()
        }
    failed = {name: error for name, future in futures.items() if (error := future.exception()) is not None}
    if failed:
        reasons = "; ".join(f"{name}: {first_line(error)}" for name, error in failed.items())
        raise TrainingError(
            f"{len(failed)} of {len(transfers)} transfers failed, the others are recorded; the same words again try "
            f"only the failed: {reasons}"
        )


def _transfer(study: Study, name: str, config: TransferConfig, backbone_url: str, pretrain_run_id: str) -> None:
    """One transfer: one unit of failure, one child run."""
    data = transfer_data(study.recipe, config)
    index = read_index(data.shards)
    tags = {
        "hemoco.run": study.run,
        "hemoco.phase": "transfer",
        "hemoco.transfer": name,
        "hemoco.metric": headline_metric(config),
        "hemoco.backbone_url": backbone_url,
        "hemoco.pretrain_run_id": pretrain_run_id,
        "hemoco.data_digest": study.data.digest,
        "hemoco.transfer_data_digest": index.digest,
    }
    run_id, finished = open_child(study, name, tags)
    if finished is not None:
        return
    tracking.log_dataset_input(study.uri, run_id, name, data.shards, index.digest, "transfer")
    job = TransferJob(
        name=name,
        config=config,
        data=data,
        backbone_url=backbone_url,
        encoder=study.recipe.pretrain.encoder,
        views=study.recipe.pretrain.views,
        url=join_url(study.url, name),
        tracking_uri=study.uri,
        run_id=run_id,
    )
    began = time.monotonic()
    with closing_run(study.uri, run_id):
        measure_transfer(job)
    logger.info("transfer %s done in %.0f s", name, time.monotonic() - began)
