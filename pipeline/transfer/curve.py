"""Transfer quality over pretraining: backbones are measured as they appear, beside the pretraining that makes them."""

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
_LOOKS = 6  # a group that begins takes its cores only after some seconds
_BACKBONE = re.compile(r"epoch_(\d+)\.safetensors")


@contextmanager
def follow_backbones(study: Study, url: str, run_id: str, whole: threading.Event) -> Iterator[None]:
    """Measures the recipe's `curve` on every backbone that the pretraining in the block exports, in a thread.

    One at a time, where cores or GPUs are free that the pretraining does not want: not while it is starting anew or has
    fewer processes than it wishes for. When the block has ended, what is left is measured, but for a block that failed.
    A failure of a measurement is logged, stands in its child run, and does not touch the pretraining; the same words
    again try it anew.

    Args:
        study: the run.
        url: folder of its pretraining.
        run_id: of the pretraining in MLflow, which gets the curve as metrics `curve/TRANSFER/METRIC` over epochs.
        whole: set while the pretraining has all its processes.
    """
    if not study.recipe.curve:
        yield
        return
    watch = _Watch(whole, threading.Event(), threading.Event())
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
    """What becomes of the pretraining."""

    whole: threading.Event
    """It has all the processes it wishes for."""
    done: threading.Event
    """It has ended."""
    failed: threading.Event
    """It has ended by an error."""


def _follow(study: Study, url: str, run_id: str, watch: _Watch) -> None:
    try:
        measured: set[int] = set()
        while not (study.stopping.is_set() or watch.failed.is_set()):
            last = (
                watch.done.is_set()
            )  # before looking: what the pretraining exported at its end is seen
            new = sorted(_epochs(url) - measured)
            for epoch, name in itertools.product(new, study.recipe.curve):
                _wait_for_spare(study.recipe.transfers[name], watch, study.stopping)
                if not (study.stopping.is_set() or watch.failed.is_set()):
                    _measure(study, url, run_id, name, epoch)
            measured |= set(new)
            if last and not new:
                return
            watch.done.wait(_LOOK_S)
    except Exception:  # of any kind: it must not touch the pretraining, and must be seen
        logger.exception("event=curve_ended; the same words again measure what is missing")


def _wait_for_spare(config: TransferConfig, watch: _Watch, stopping: threading.Event) -> None:
    """Returns when what a transfer needs was free for some time, or the pretraining has ended."""
    workers = config.workers if isinstance(config, TrainedConfig) else 1
    needs = ResourcesConfig(
        workers=workers, cpus_per_worker=config.cpus, gpus_per_worker=config.gpus
    )
    seen = 0
    while seen < _LOOKS and not watch.done.is_set() and not stopping.is_set():
        seen = seen + 1 if watch.whole.is_set() and fitting_workers(needs) >= workers else 0
        watch.done.wait(_LOOK_S)


def _epochs(url: str) -> set[int]:
    """Of the backbones exported so far."""
    found = (_BACKBONE.fullmatch(name) for name in list_names(join_url(url, BACKBONES)))
    return {int(match[1]) for match in found if match}


def _measure(study: Study, url: str, run_id: str, name: str, epoch: int) -> None:
    config = dataclasses.replace(study.recipe.transfers[name], inits=("pretrained",))
    origin = Origin(epoch_backbone(url, epoch), run_id)
    tags = {Tag.PHASE: "curve", Tag.TRANSFER: name, Tag.EPOCH: str(epoch)}
    folder = join_url(study.url, f"curve_{name}_epoch_{epoch:04d}")  # no deeper: `sync` looks there
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
    """Puts the mean over the seeds into the pretraining's run, at the epoch as its step, once."""
    key = f"curve/{name}/{metric}"
    if epoch in dict(tracking.metric_history(study.uri, run_id, key)):
        return
    metrics = tracking.run_facts(study.uri, child).metrics
    values = seed_values(metrics, PRETRAINED, metric)
    with metric_queue.Tracker(
        study.uri, run_id, join_url(study.url, "curve", "unsent_metrics", run_id)
    ) as tracker:
        tracker.log(epoch, {key: sum(values) / len(values)})
