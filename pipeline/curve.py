"""Transfer quality over pretraining: backbones are measured as they appear, beside the pretraining that makes them."""

import dataclasses
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hemoco import tracking
from hemoco.config import ResourcesConfig, TrainedConfig, TransferConfig
from hemoco.errors import HemocoError
from hemoco.storage import join_url, list_names
from pipeline.fan_out import record_transfer
from pipeline.lineage import PRETRAINED, record_snapshot, seed_values
from pipeline.pretrain import BACKBONES, epoch_backbone
from pipeline.room import fitting_workers
from pipeline.study import Origin, Study
from pipeline.transfer import headline_metric

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_LOOKS = 3  # a pretraining that lost a process leaves its cores for some seconds
_BACKBONE = re.compile(r"epoch_(\d+)\.safetensors")


@contextmanager
def follow_backbones(study: Study, url: str, run_id: str) -> Iterator[None]:
    """Measures the recipe's `curve` on every backbone that the pretraining in the block exports, in a thread.

    One at a time, where cores or GPUs are free that the pretraining does not want: also not while it is starting anew.
    At the end of the block what is left is measured. A failure is logged, stands in its child run, and does not touch
    the pretraining; the same words again try it anew.

    Args:
        study: the run.
        url: folder of its pretraining.
        run_id: of the pretraining in MLflow, which gets the curve as metrics `curve/TRANSFER/METRIC` over epochs.
    """
    if not study.recipe.curve:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(study, url, run_id, done), name="hemoco-curve", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        study.stopping.set()
        raise
    finally:
        done.set()
        while thread.is_alive() and not study.stopping.is_set():
            thread.join(0.2)


def _follow(study: Study, url: str, run_id: str, done: threading.Event) -> None:
    measured: set[int] = set()
    while not study.stopping.is_set():
        last = done.is_set()  # before looking: what the pretraining exported at its end is seen
        try:
            new = sorted(_epochs(url) - measured)
        except HemocoError as error:
            logger.warning("event=curve_waits reason=%s", error)
            new = []
        for epoch in new:
            measured.add(epoch)
            for name in study.recipe.curve:
                _wait_for_spare(study.recipe.transfers[name], done, study.stopping)
                _measure(study, url, run_id, name, epoch)
        if last and not new:
            return
        done.wait(_LOOK_S)


def _wait_for_spare(config: TransferConfig, done: threading.Event, stopping: threading.Event) -> None:
    """Returns when what a transfer needs was free for some time, or the pretraining has ended."""
    workers = config.workers if isinstance(config, TrainedConfig) else 1
    needs = ResourcesConfig(workers=workers, cpus_per_worker=config.cpus, gpus_per_worker=config.gpus)
    seen = 0
    while seen < _LOOKS and not done.is_set() and not stopping.is_set():
        seen = seen + 1 if fitting_workers(needs) >= workers else 0
        done.wait(_LOOK_S)


def _epochs(url: str) -> set[int]:
    """Of the backbones exported so far."""
    found = (_BACKBONE.fullmatch(name) for name in list_names(join_url(url, BACKBONES)))
    return {int(match[1]) for match in found if match}


def _measure(study: Study, url: str, run_id: str, name: str, epoch: int) -> None:
    config = dataclasses.replace(study.recipe.transfers[name], inits=("pretrained",))
    origin = Origin(epoch_backbone(url, epoch), run_id)
    tags = {"hemoco.phase": "curve", "hemoco.transfer": name, "hemoco.epoch": str(epoch)}
    folder = join_url(study.url, "curve", f"{name}_epoch_{epoch:04d}")
    try:
        tags["hemoco.model/pretrained"] = record_snapshot(study, run_id, origin.backbone_url, epoch)
        child = record_transfer(study, name, config, origin, tags=tags, url=folder)
        _add_to_curve(study, run_id, child, name, headline_metric(config), epoch)
    except HemocoError as error:
        logger.warning("event=curve_failed transfer=%s epoch=%d reason=%s", name, epoch, error)


def _add_to_curve(study: Study, run_id: str, child: str, name: str, metric: str, epoch: int) -> None:
    """Puts the mean over the seeds into the pretraining's run, at the epoch as its step, once."""
    key = f"curve/{name}/{metric}"
    if epoch in dict(tracking.metric_history(study.uri, run_id, key)):
        return
    metrics = tracking.run_facts(study.uri, child).metrics
    values = seed_values(metrics, PRETRAINED, metric)
    with tracking.Tracker(study.uri, run_id, join_url(study.url, "curve", "unsent_metrics", run_id)) as tracker:
        tracker.log(epoch, {key: sum(values) / len(values)})
