"""Transfer quality over epochs: a pretraining's backbones are measured while it continues."""

import dataclasses
import itertools
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from hemoco.config import ResourcesConfig, TrainedConfig, TransferConfig
from hemoco.errors import HemocoError
from hemoco.results.records import PRETRAINED
from hemoco.storage.objects import join_url, list_names
from hemoco.tracking import metric_queue
from hemoco.tracking import runs as tracking
from hemoco.tracking.tags import Tag
from pipeline.lineage import record_snapshot, seed_values
from pipeline.open_run import Origin, Study
from pipeline.pretrain import BACKBONES, epoch_backbone
from pipeline.transfer.fan_out import record_transfer
from pipeline.transfer.units import headline_metric
from pipeline.workers.capacity import fitting_workers

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_LOOKS = 6
"""Looks in a row that must find free resources: a starting group takes its cores with a delay."""
_BACKBONE = re.compile(r"epoch_(\d+)\.safetensors")


@contextmanager
def follow_backbones(study: Study, url: str, run_id: str, full: threading.Event) -> Iterator[None]:
    """Measures the recipe's `curve` on each backbone that the pretraining in the block exports.

    A thread measures one backbone at a time, on cores and GPUs that the pretraining does not want.
    It waits while the pretraining restarts or has fewer processes than requested. When the block
    ends without an error, the remaining backbones are measured before this returns.

    A failed measurement is logged and recorded in its child run; the pretraining continues. The
    same command retries it.

    Args:
        study: the run.
        url: URL of its pretraining's folder.
        run_id: MLflow's id of the pretraining, which receives the metrics
            `curve/TRANSFER/METRIC` by epoch.
        full: set while the pretraining has all the processes it requested.
    """
    if not study.recipe.curve:
        yield
        return
    watch = _Watch(full, threading.Event(), threading.Event())
    thread = threading.Thread(
        target=_follow, args=(study, url, run_id, watch), name="hemoco-curve", daemon=True
    )
    thread.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            study.stopping.set()
        watch.failed.set()
        raise
    finally:
        watch.done.set()
        while thread.is_alive() and not study.stopping.is_set():
            thread.join(0.2)


class _Watch(NamedTuple):
    """State of the pretraining."""

    full: threading.Event
    """It has all the processes it requested."""
    done: threading.Event
    """It has ended."""
    failed: threading.Event
    """It has ended with an error."""


def _follow(study: Study, url: str, run_id: str, watch: _Watch) -> None:
    try:
        measured: set[int] = set()
        while not (study.stopping.is_set() or watch.failed.is_set()):
            # Asked before listing: the last list must include what was exported at the very end.
            last = watch.done.is_set()
            new = sorted(_epochs(url) - measured)
            for epoch, name in itertools.product(new, study.recipe.curve):
                _wait_for_free_resources(study.recipe.transfers[name], watch, study.stopping)
                if not (study.stopping.is_set() or watch.failed.is_set()):
                    _measure(study, url, run_id, name, epoch)
            measured |= set(new)
            if last and not new:
                return
            watch.done.wait(_LOOK_S)
    except Exception:  # of any kind: the pretraining must continue, and the error be visible
        logger.exception("event=curve_ended; the same command measures what is missing")


def _wait_for_free_resources(
    config: TransferConfig, watch: _Watch, stopping: threading.Event
) -> None:
    """Waits until a transfer's resources were free for some time or the pretraining has ended."""
    workers = config.workers if isinstance(config, TrainedConfig) else 1
    needs = ResourcesConfig(
        workers=workers, cpus_per_worker=config.cpus, gpus_per_worker=config.gpus
    )
    looks = 0
    while looks < _LOOKS and not watch.done.is_set() and not stopping.is_set():
        are_free = watch.full.is_set() and fitting_workers(needs) >= workers
        looks = looks + 1 if are_free else 0
        watch.done.wait(_LOOK_S)


def _epochs(url: str) -> set[int]:
    """Returns the epochs of the backbones exported so far."""
    matches = map(_BACKBONE.fullmatch, list_names(join_url(url, BACKBONES)))
    return {int(match[1]) for match in matches if match}


def _measure(study: Study, url: str, run_id: str, name: str, epoch: int) -> None:
    config = dataclasses.replace(study.recipe.transfers[name], inits=("pretrained",))
    origin = Origin(epoch_backbone(url, epoch), run_id)
    tags = {Tag.PHASE: "curve", Tag.TRANSFER: name, Tag.EPOCH: str(epoch)}
    # directly below the run's folder, where `sync` looks for unsent metrics
    folder = join_url(study.url, f"curve_{name}_epoch_{epoch:04d}")
    try:
        tags[f"{Tag.MODEL_PREFIX}pretrained"] = record_snapshot(
            study, run_id, origin.backbone_url, epoch
        )
        child = record_transfer(study, name, config, origin, tags=tags, url=folder)
        _add_to_curve(study, run_id, child, name, headline_metric(config), epoch)
    except HemocoError as error:
        logger.warning("event=curve_failed transfer=%s epoch=%d reason=%s", name, epoch, error)


def _add_to_curve(
    study: Study, run_id: str, child: str, name: str, metric: str, epoch: int
) -> None:
    """Logs the mean over the seeds to the pretraining's run, with the epoch as its step, once."""
    key = f"curve/{name}/{metric}"
    if epoch in dict(tracking.metric_history(study.uri, run_id, key)):
        return
    metrics = tracking.run_facts(study.uri, child).metrics
    values = seed_values(metrics, PRETRAINED, metric)
    unsent = join_url(study.url, "curve", "unsent_metrics", run_id)
    with metric_queue.Tracker(study.uri, run_id, unsent) as tracker:
        tracker.log(epoch, {key: sum(values) / len(values)})
