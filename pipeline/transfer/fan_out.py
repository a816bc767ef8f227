"""Fan-out of transfers from one driver: each is a child run, and fails and is retried by itself."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from hemoco.config import TransferConfig
from hemoco.config.kinds import transfer_kind
from hemoco.storage.objects import join_url
from hemoco.tracking import runs as tracking
from hemoco.tracking.models import Data
from hemoco.tracking.tags import Tag
from pipeline.checks import transfer_data
from pipeline.lineage import BackboneModels, data_counts, data_name, link_models, log_results
from pipeline.open_run import Origin, Study, closing_run, open_child
from pipeline.transfer.job import TransferJob
from pipeline.transfer.units import headline_metric, measure_transfer

logger = logging.getLogger(__name__)

_GRACE_S = 10.0
"""Seconds that interrupted threads have to close their MLflow runs."""
_POLL_S = 0.2


def transfer_once(study: Study, name: str, origin: Origin, models: BackboneModels) -> None:
    """Measures one transfer of a run, unless its result is recorded already.

    Raises:
        HemocoError: it failed; its run in MLflow has the reason.
    """
    config = study.recipe.transfers[name]
    tags = {Tag.PHASE: "transfer", Tag.TRANSFER: name} | models.tags(config)
    record_transfer(study, name, config, origin, tags=tags, url=join_url(study.url, name))


def record_transfer(
    study: Study,
    name: str,
    config: TransferConfig,
    origin: Origin,
    *,
    tags: dict[str, str],
    url: str,
) -> str:
    """Measures a transfer in its own child run, unless one with these tags is finished.

    Args:
        study: the run to which the transfer belongs.
        name: name of the transfer in the recipe.
        config: what is measured.
        origin: the backbone.
        tags: tags that identify the child run, and `hemoco.model/INIT` with the id of each init's
            logged model.
        url: URL of the transfer's folder.

    Returns:
        The id of the child run.
    """
    data = transfer_data(study.recipe, config)
    index = study.indexes.at(data.shards)
    facts = {
        Tag.RUN: study.run,
        Tag.METRIC: headline_metric(config),
        Tag.TRANSFER_KIND: transfer_kind(config),
        Tag.BACKBONE_URL: origin.backbone_url,
        Tag.PRETRAIN_RUN_ID: origin.run_id,
        Tag.DATA_DIGEST: study.data.digest,
        Tag.TRANSFER_DATA_DIGEST: index.digest,
    }
    run_id, finished = open_child(study, name, facts | tags)
    if finished is not None:
        return run_id
    measured_on = Data(data_name(data), index.digest)
    tracking.log_dataset_input(
        study.uri,
        run_id,
        measured_on.name,
        data.shards,
        index.digest,
        "transfer",
        counts=data_counts(index),
    )
    link_models(study, run_id, tags)
    job = TransferJob(
        name=name,
        config=config,
        data=data,
        backbone_url=origin.backbone_url,
        encoder=study.recipe.pretrain.encoder,
        views=study.recipe.pretrain.views,
        url=url,
        tracking_uri=study.uri,
        run_id=run_id,
    )
    began = time.monotonic()
    with closing_run(study.uri, run_id, study.stopping):
        measure_transfer(job, study.stopping)
        log_results(study, run_id, name, measured_on, facts | tags)
    logger.info("transfer %s done in %.0f s", name, time.monotonic() - began)
    return run_id


def in_threads(
    calls: Mapping[str, Callable[[], None]], *, at_once: int, stopping: threading.Event
) -> dict[str, Exception]:
    """Makes calls in threads and waits for them.

    Args:
        calls: the calls by name.
        at_once: most calls that run at the same time.
        stopping: set when this thread is interrupted; the calls must then end.

    Returns:
        The exceptions of the calls that failed, by name.
    """
    failed: dict[str, Exception] = {}
    slots = threading.Semaphore(at_once)

    def work(name: str, call: Callable[[], None]) -> None:
        with slots:
            if stopping.is_set():
                return
            try:
                call()
            except Exception as error:  # of any kind: it is returned, and the other calls continue
                failed[name] = error

    # Daemon threads: a thread that waits for Ray cannot be interrupted, and must not keep this
    # process alive after Ctrl-C (test_interrupt).
    threads = [
        threading.Thread(target=work, args=(name, call), name=name, daemon=True)
        for name, call in calls.items()
    ]
    try:
        for thread in threads:
            thread.start()
        # Polling, since a join without a timeout can hold back Ctrl-C.
        while any(thread.is_alive() for thread in threads):
            time.sleep(_POLL_S)
    except BaseException:
        stopping.set()
        deadline = time.monotonic() + _GRACE_S
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        raise
    return failed
