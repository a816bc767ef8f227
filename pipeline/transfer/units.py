"""The transfer stage: the units of one transfer, measured in Ray tasks or by a group of workers.

A unit is one init and one seed. Units that one process can measure run in parallel; a transfer that
trains on several workers trains one unit after another. Each unit is tried, also after another has
failed; then the transfer fails as a whole, and the measured units stay recorded.
"""

import logging
import threading
from collections.abc import Iterator
from functools import partial

import torch

from hemoco.config import (
    DetectionConfig,
    KnnConfig,
    LinearProbeConfig,
    LowShotConfig,
    ResourcesConfig,
    TrainedConfig,
    TransferConfig,
)
from hemoco.data.labelled import LabelledSplit, open_split
from hemoco.data.shards.index import ShardIndex, read_index
from hemoco.errors import HemocoError, TrackingError, TrainingError, first_line, memory_errors
from hemoco.features.cache import FeatureCache
from hemoco.features.extract import calibrate_batch_norm
from hemoco.storage.objects import home
from hemoco.storage.retry import EVALUATION_PATIENCE_S
from hemoco.transfer.classification.knn import run_knn
from hemoco.transfer.classification.linear_probe import run_linear_probe
from hemoco.transfer.classification.low_shot import run_low_shot
from hemoco.transfer.detection import predictions as detections
from hemoco.transfer.result import TransferResult
from pipeline.transfer.job import (
    TransferJob,
    TransferUnit,
    begin_attempt,
    calibration_images,
    open_units,
    record_result,
    result_line,
)
from pipeline.transfer.training import train_alone, train_as_rank
from pipeline.workers.group import GroupSize, run_workers
from pipeline.workers.tasks import CancelledError, Outcome, attempt_tasks, try_again

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "lower max_parallel_transfers or take machines with more memory; "
    "the same command measures only what is missing"
)


def measure_transfer(job: TransferJob, stopping: threading.Event) -> None:
    """Measures all units of a transfer that are not yet recorded, on Ray.

    Args:
        job: the transfer.
        stopping: cancels the transfer when it is set.

    Raises:
        TrainingError: units failed; the message names them with their reasons.
        CancelledError: `stopping` was set.
    """
    units = open_units(job)
    logger.info("transfer %s: %d to measure", job.name, len(units))
    failed: dict[TransferUnit, HemocoError] = {}
    for outcome in _measure_units(units, job.config, stopping):
        for line in outcome.result or []:
            logger.info("transfer %s", line)
        if outcome.error is not None:
            failed |= dict.fromkeys(_units_of(outcome), outcome.error)
    still_open = _still_open(job, list(failed)) if failed else []
    if still_open:
        reasons = [f"{unit.prefix}: {first_line(failed[unit])}" for unit in still_open]
        raise TrainingError("; ".join(sorted(reasons)))


def _measure_units(
    units: list[TransferUnit], config: TransferConfig, stopping: threading.Event
) -> Iterator[Outcome]:
    """Yields an outcome for each task: its lines of results, or its error."""
    run = partial(attempt_tasks, cpus=config.cpus, gpus=config.gpus, stopping=stopping)
    if not isinstance(config, TrainedConfig):
        # One task for all seeds of an init: they share the features of the frozen backbone.
        arguments = []
        for init in config.inits:
            of_init = [unit for unit in units if unit.init == init]
            if of_init:
                arguments.append((of_init,))
        yield from run(measure_frozen, arguments)
    elif config.workers == 1:
        yield from run(train_alone, [(unit,) for unit in units])
    else:
        for unit in units:  # one after another: each takes all the workers of the transfer
            if stopping.is_set():
                raise CancelledError("cancelled with its run")
            yield try_again(partial(_train_together, unit, config), (unit,))


def _still_open(job: TransferJob, failed: list[TransferUnit]) -> list[TransferUnit]:
    """Returns the failed units that are not recorded; a task may fail after recording some."""
    try:
        return [unit for unit in failed if unit in open_units(job)]
    except TrackingError:  # probably the cause of the failures, which name it
        return failed


def _units_of(outcome: Outcome) -> list[TransferUnit]:
    (units,) = outcome.arguments
    return units if isinstance(units, list) else [units]


def headline_metric(config: TransferConfig) -> str:
    """Returns the metric that a comparison shows for a transfer."""
    return detections.headline_metric(config) if isinstance(config, DetectionConfig) else "top1"


def measure_frozen(units: list[TransferUnit]) -> list[str]:
    """Measures units of one transfer that start from the same frozen backbone, in a Ray task.

    Returns:
        A line for each result.

    Raises:
        HemocoError: the error of the first unit that failed; all units were tried.
    """
    job = units[0].job
    torch.set_num_threads(job.config.cpus)
    still_open = open_units(job)  # a first attempt may have recorded some
    data, size = job.data, job.views.size
    index = read_index(data.shards, patience_s=EVALUATION_PATIENCE_S)
    train, test = (
        open_split(data.shards, index, split, size) for split in (data.train_split, data.test_split)
    )
    lines, errors = [], []
    for unit in (unit for unit in units if unit in still_open):
        begin_attempt(unit)
        try:
            with memory_errors(lambda unit=unit: unit.prefix, _LESS_MEMORY):  # type: ignore[misc]
                result = _measure(unit, index, train, test)
        except HemocoError as error:
            errors.append(error)
            continue
        record_result(unit, result, result.history[-1][0] if result.history else 0)
        lines.append(result_line(unit, result))
    if errors:
        raise errors[0]
    return lines


def _train_together(unit: TransferUnit, config: TrainedConfig) -> list[str]:
    """Trains a unit on several workers of Ray Train."""
    resources = ResourcesConfig(
        workers=config.workers, cpus_per_worker=config.cpus, gpus_per_worker=config.gpus
    )
    # each worker has an equal part of the batch
    allowed = [n for n in range(1, config.workers + 1) if config.global_batch_size % n == 0]
    size = GroupSize(resources, allowed)
    name = f"{unit.job.name}-{unit.prefix.replace('/', '-')}"
    lines: list[str] = run_workers(train_as_rank, unit, name=name, size=size, storage=unit.url)
    return lines


def _measure(
    unit: TransferUnit, index: ShardIndex, train: LabelledSplit, test: LabelledSplit
) -> TransferResult:
    config = unit.job.config
    backbone = unit.backbone().to("cuda" if config.gpus else "cpu")
    if unit.init == "random":
        # Its BN statistics are those of no data; without this, its features are badly scaled.
        calibrate_batch_norm(backbone, calibration_images(unit, index, train.size))
    cache = FeatureCache(home() / "features")
    if isinstance(config, KnnConfig):
        return run_knn(config, backbone, train, test, unit.seed, cache)
    if isinstance(config, LinearProbeConfig):
        return run_linear_probe(config, backbone, train, test, unit.seed, cache)
    assert isinstance(config, LowShotConfig)
    return run_low_shot(config, backbone, train, test, unit.seed, cache)
