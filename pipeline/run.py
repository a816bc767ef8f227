"""The stages of a run: pretraining, then its transfers in parallel, recorded in MLflow.

A run is identified by its name. Work that MLflow has as finished is not repeated; other work is
resumed.
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
    """Pretrains, then measures all transfers of the recipe.

    The result is in MLflow, where `hemoco.results` reads it. Callers check the recipe first
    (`pipeline.checks`).

    Args:
        recipe: the recipe, with absolute URLs.
        indexes: shard indexes that this command has read.
        run: name of the run. Unfinished work under this name is resumed, finished work is kept.
        storage: URL of the folder that receives the run's folder, with checkpoints and backbone.
        fresh: start anew; MLflow runs of this name are renamed and the run's folder is removed.
        tags: further tags of the run in MLflow, for example the commit of the code.

    Raises:
        UsageError: the name belongs to a run with other settings, or another process works on it.
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
    """Does the first half of `pretrain_then_transfer`, with the same arguments and errors.

    A later `pretrain_then_transfer` under the same name does the second half.
    """
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
    """Does the second half of `pretrain_then_transfer` for any backbone.

    Args:
        recipe: the transfers and their data; of `pretrain` only the encoder and the views matter.
        indexes: shard indexes that this command has read.
        backbone_url: URL of a backbone file, or `models:/...` for one in MLflow's registry.
        run: name of the run.
        storage: URL of the folder that receives the run's folder.
        fresh: start anew; MLflow runs of this name are renamed and the run's folder is removed.
        tags: further tags of the run in MLflow, for example the commit of the code.

    Raises:
        UsageError: the run measures another backbone or has other settings, or another process
            works on it.
        CheckpointError: a backbone cannot be read.
        ConfigError: a backbone has another architecture than the recipe.
        TrainingError: a transfer failed; the others are finished and recorded.
    """
    registered = backbone_url.startswith(SCHEME)
    content = b""
    if registered:
        backbone_url = pinned(backbone_url)
        content = read_backbone(backbone_url)  # MLflow serves no byte ranges, only whole files
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
                f"run {run!r} measures another backbone ({before}): "
                "choose another --run name, or --fresh to start it anew"
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
        if registered:
            # Workers can read the run's storage, but perhaps not MLflow's artifacts.
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
    """Opens a run for this process alone, and records in MLflow how it ended."""
    with only_driver(run):
        study = open_study(
            recipe, indexes=indexes, run=run, storage=storage, fresh=fresh, tags=tags
        )
        with closing_run(study.uri, study.parent_id, study.stopping):
            _log_recipe(study)
            try:
                yield study
            finally:
                if study.stopping.is_set():
                    # Threads that wait for Ray end with this process, before they could close
                    # their own MLflow runs (test_interrupt).
                    with contextlib.suppress(TrackingError):
                        close_running(study.uri, study.run)


def _log_recipe(study: Study) -> None:
    """Stores the recipe with the run, as a file that `python -m jobs run` accepts."""
    recipe = pprint.pformat(study.recipe, width=120, sort_dicts=False)
    text = f"from hemoco.config import *\n\nrecipe = {recipe}\n"
    tracking.log_artifact_bytes(study.uri, study.parent_id, "recipe.py", text.encode())


def _pretrain(study: Study) -> Pretrained:
    """Pretrains, or returns the finished pretraining of this run."""
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
        with follow_backbones(study, url, run_id, size.full):
            pass  # measures the points of the curve that are still missing
        return Pretrained(
            run_id=run_id, backbone_url=finished.tags[Tag.BACKBONE_URL], metrics=finished.metrics
        )
    data, index = study.recipe.data, study.data
    tracking.log_dataset_input(
        study.uri,
        run_id,
        data_name(data),
        data.shards,
        index.digest,
        "pretraining",
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
        follow_backbones(study, url, run_id, size.full),
    ):
        done = pretrain(job, size)
        tracking.set_tags(study.uri, run_id, {Tag.BACKBONE_URL: done.backbone_url})
    logger.info("pretrain done, backbone %s", done.backbone_url)
    return done


def _transfer_all(study: Study, origin: Origin, model_id: str) -> None:
    """Measures all transfers in parallel; each is tried, also after another has failed.

    Args:
        study: the run.
        origin: the backbone.
        model_id: id of the backbone's logged model in MLflow.

    Raises:
        TrainingError: at least one failed; the message names each with its reason.
    """
    transfers = study.recipe.transfers
    models = BackboneModels(study, model_id, origin.backbone_url)
    calls: dict[str, Callable[[], None]] = {
        name: lambda name=name: transfer_once(study, name, origin, models)  # type: ignore[misc]
        for name in transfers
    }
    failed = in_threads(calls, at_once=study.recipe.max_parallel_transfers, stopping=study.stopping)
    if failed:
        reasons = "; ".join(f"{name}: {first_line(error)}" for name, error in failed.items())
        raise TrainingError(
            f"{len(failed)} of {len(transfers)} transfers failed, the others are recorded; "
            f"run the same command again to retry only the failed ones: {reasons}"
        )
