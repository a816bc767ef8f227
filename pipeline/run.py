"""The graph: pretraining, then its transfers side by side, recorded in MLflow.

A run is its name. What MLflow says is finished is not done again; what is not goes on.
"""

import contextlib
import logging
import pprint
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hemoco.backbones.file import backbone_metadata, parse_metadata, read_backbone
from hemoco.backbones.inits import check_architecture
from hemoco.config import Recipe, world_sizes
from hemoco.config.kinds import method_name
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import TrackingError, TrainingError, UsageError, first_line
from hemoco.results.status import close_running
from hemoco.storage.objects import check_url, join_url, write_bytes
from hemoco.tracking import runs as tracking
from hemoco.tracking.models import SCHEME
from hemoco.tracking.tags import Tag
from hemoco.tracking.versions import pinned
from pipeline.lineage import BackboneModels, data_counts, data_name, record_given, record_pretrained
from pipeline.open_run import Origin, Study, closing_run, open_child, open_study
from pipeline.pretrain import Pretrained, PretrainJob, pretrain
from pipeline.transfer.curve import follow_backbones
from pipeline.transfer.fan_out import in_threads, transfer_once
from pipeline.workers.group import GroupSize
from pipeline.workers.run_lock import only_driver

logger = logging.getLogger(__name__)


def pretrain_then_transfer(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> None:
    """The whole way; the result is in MLflow, where `hemoco.results` reads it. `pipeline.checks` checks before.

    Args:
        recipe: what to do, with absolute URLs.
        indexes: of this command.
        run: its identity; unfinished work under the same name goes on, finished work is kept.
        storage: URL of the folder that receives checkpoints and backbone.
        fresh: forget what is there under that name.
        tags: of the run in MLflow, for example the commit of the code.

    Raises:
        UsageError: the name belongs to a run with other settings, or another process is at it.
        TrainingError: a transfer failed; the others are finished and recorded.
    """
    with _opened(
        recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
    ) as study:
        done = _pretrain(study)
        model_id = record_pretrained(study, done.run_id, done.backbone_url)
        _transfer_all(study, Origin(done.backbone_url, done.run_id), model_id)


def pretrain_only(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> Pretrained:
    """The first half of `pretrain_then_transfer`; a later `run` of the same name does the second. Checks as there."""
    with _opened(
        recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
    ) as study:
        done = _pretrain(study)
        record_pretrained(study, done.run_id, done.backbone_url)
        return done


def transfer_only(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    backbone_url: str,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> None:
    """The second half of `pretrain_then_transfer`, from any backbone, also one of MLflow's registry (models:/...).

    Raises:
        UsageError: the run measures another backbone, or has other settings, or another process is at it.
        CheckpointError: a backbone cannot be read.
        ConfigError: one is of another architecture than the recipe's.
        TrainingError: a transfer failed; the others are finished and recorded.
    """
    registered = backbone_url.startswith(SCHEME)
    content = b""
    if registered:
        backbone_url = pinned(backbone_url)
        content = read_backbone(backbone_url)  # MLflow gives whole files only
        metadata = parse_metadata(backbone_url, content)
    else:
        check_url("backbone_url", backbone_url)
        metadata = backbone_metadata(backbone_url)
    check_architecture(backbone_url, metadata, recipe.pretrain.encoder)
    with _opened(
        recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
    ) as study:
        before = tracking.run_facts(study.uri, study.parent_id).tags.get(
            Tag.BACKBONE_URL, backbone_url
        )
        if before != backbone_url:
            raise UsageError(
                f"run {run!r} measures another backbone ({before}): choose another --run name, or --fresh to start it "
                "anew"
            )
        sources = {
            f"{Tag.BACKBONE_PREFIX}{name}": metadata[name]
            for name in ("source", "source_sha256")
            if name in metadata
        }
        origin = {
            Tag.BACKBONE_URL: backbone_url,
            Tag.PRETRAIN_RUN_ID: metadata["run_id"],
            Tag.DATA_DIGEST: metadata["data_digest"],
        }
        tracking.set_tags(study.uri, study.parent_id, origin | sources)
        if registered:  # the workers read storage; they need no way to MLflow's files
            backbone_url = join_url(study.url, "backbone.safetensors")
            write_bytes(backbone_url, content)
        _transfer_all(
            study, Origin(backbone_url, metadata["run_id"]), record_given(study, backbone_url)
        )


@contextmanager
def _opened(
    recipe: Recipe,
    *,
    indexes: ShardIndexes,
    run: str,
    storage: str,
    fresh: bool,
    tags: dict[str, str],
) -> Iterator[Study]:
    """A run that this process alone is at; MLflow learns how it ended."""
    with only_driver(run):
        study = open_study(
            recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
        )
        with closing_run(study.uri, study.parent_id, study.stopping):
            _log_recipe(study)
            try:
                yield study
            finally:
                if (
                    study.stopping.is_set()
                ):  # threads that wait for Ray do not come to closing theirs
                    with contextlib.suppress(TrackingError):
                        close_running(study.uri, study.run)


def _log_recipe(study: Study) -> None:
    """Puts the recipe into the run as a file that `python -m jobs run` takes."""
    text = f"from hemoco.config import *\n\nrecipe = {pprint.pformat(study.recipe, width=120, sort_dicts=False)}\n"
    tracking.log_artifact_bytes(study.uri, study.parent_id, "recipe.py", text.encode())


def _pretrain(study: Study) -> Pretrained:
    """Pretrains, or takes up the finished pretraining of this run."""
    tags = {
        Tag.RUN: study.run,
        Tag.PHASE: "pretrain",
        Tag.RECIPE: study.recipe.name,
        Tag.DATA_DIGEST: study.data.digest,
        Tag.METHOD: method_name(study.recipe.pretrain.moco),
    }
    run_id, finished = open_child(study, "pretrain", tags)
    config, url = study.recipe.pretrain, join_url(study.url, "pretrain")
    size = GroupSize(config.resources, world_sizes(config))
    if finished is not None:
        with follow_backbones(study, url, run_id, size.whole):
            pass  # only what is missing of the curve
        return Pretrained(
            run_id=run_id, backbone_url=finished.tags[Tag.BACKBONE_URL], metrics=finished.metrics
        )
    data, index = study.recipe.data, study.data
    tracking.log_dataset_input(
        *(study.uri, run_id, data_name(data), data.shards, index.digest, "pretraining"),
        counts=data_counts(index),
    )
    job = PretrainJob(
        config=config,
        data=data,
        url=url,
        tracking_uri=study.uri,
        run_id=run_id,
    )
    with (
        closing_run(study.uri, run_id, study.stopping),
        follow_backbones(study, url, run_id, size.whole),
    ):
        done = pretrain(job, size)
        tracking.set_tags(study.uri, run_id, {Tag.BACKBONE_URL: done.backbone_url})
    logger.info("pretrain done, backbone %s", done.backbone_url)
    return done


def _transfer_all(study: Study, origin: Origin, model_id: str) -> None:
    """All transfers side by side; every one is tried, then the failed ones are named. `model_id`: of the origin.

    Raises:
        TrainingError: at least one failed.
    """
    transfers, models = study.recipe.transfers, BackboneModels(study, model_id, origin.backbone_url)
    calls: dict[str, Callable[[], None]] = {
        name: lambda name=name: transfer_once(study, name, origin, models)  # type: ignore[misc]
        for name in transfers
    }
    failed = in_threads(calls, at_once=study.recipe.max_parallel_transfers, stopping=study.stopping)
    if failed:
        reasons = "; ".join(f"{name}: {first_line(error)}" for name, error in failed.items())
        raise TrainingError(
            f"{len(failed)} of {len(transfers)} transfers failed, the others are recorded; the same words again try "
            f"only the failed: {reasons}"
        )
