"""A trained transfer of one init and seed: what every training process runs, in one Ray task or as ranks of Ray Train.

It goes on from its newest checkpoint by itself.

Shapes: N images of a batch, S x S pixels each.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from functools import partial

import torch

from hemoco.config import (
    ClassifierConfig,
    DetectionConfig,
    LinearClassifierConfig,
    MaskRcnnConfig,
    ResourcesConfig,
    TrainedConfig,
)
from hemoco.data.labelled import open_split
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, steps_per_epoch
from hemoco.distributed import rank, world_size
from hemoco.errors import memory_errors
from hemoco.features.extract import calibrate_batch_norm
from hemoco.storage.objects import join_url
from hemoco.storage.retry import EVALUATION_PATIENCE_S, patiently
from hemoco.tracking.metric_queue import Tracker
from hemoco.train.checkpoint import resume_newest, save_checkpoint
from hemoco.train.state import LoggedStep, TrainingState
from hemoco.transfer.classification.classifier import build_classifier_state, classifier_plan
from hemoco.transfer.classification.scores import (
    check_labels,
    classification_result,
    count_predictions,
)
from hemoco.transfer.classification.training import classifier_steps, classify
from hemoco.transfer.detection.data import load_detection_samples
from hemoco.transfer.detection.detector import scaled_schedule
from hemoco.transfer.detection.training import (
    build_detection_state,
    detection_steps,
    evaluate_detector,
    sorted_category_ids,
)
from hemoco.transfer.result import TransferResult
from pipeline.time_left import TimeLeft, left_text
from pipeline.transfer.job import (
    TransferUnit,
    begin_attempt,
    calibration_images,
    log_values,
    record_result,
    result_line,
    unit_tracker,
)
from pipeline.workers.interruption import TrainingProcess, sigterm_noted
from pipeline.workers.tasks import Interrupted

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 20.0
_LESS_MEMORY = (
    "take more workers for this transfer or machines with more memory; "
    "the same command resumes it from the last checkpoint"
)


def train_as_rank(unit: TransferUnit, process: TrainingProcess) -> list[str] | Interrupted:
    """What each of several processes of Ray Train runs; the result in a line, the only one."""
    if rank() == 0:
        begin_attempt(unit)
    return _train(unit, process)


def train_alone(unit: TransferUnit) -> list[str] | Interrupted:
    """What a Ray task runs; the result in a line, the only one."""
    config = unit.job.config
    begin_attempt(unit)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)  # Ray brings the lines to the driver
    torch.set_num_threads(config.cpus)
    alone = ResourcesConfig(cpus_per_worker=config.cpus, gpus_per_worker=config.gpus)
    with sigterm_noted():
        return _train(
            unit, TrainingProcess(torch.device("cuda" if config.gpus else "cpu"), alone, [1])
        )


def _train(unit: TransferUnit, process: TrainingProcess) -> list[str] | Interrupted:
    config = unit.job.config
    assert isinstance(config, TrainedConfig)
    with unit_tracker(unit) if rank() == 0 else nullcontext() as tracker:
        log = _Log(unit, tracker)
        train = train_classifier if isinstance(config, ClassifierConfig) else train_detector
        with memory_errors(lambda: f"{unit.prefix} after step {log.last_step}", _LESS_MEMORY):
            result = train(unit, process, log)
    if isinstance(result, Interrupted):
        return result
    if rank() == 0:
        record_result(unit, result, log.last_step)
    return [result_line(unit, result)]


class _Log:
    """Takes the values of steps; only rank 0 has a tracker."""

    def __init__(self, unit: TransferUnit, tracker: Tracker | None) -> None:
        self._unit, self._tracker = unit, tracker
        self.last_step = 0

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.last_step = step
        if values and self._tracker is not None:
            log_values(self._tracker, self._unit, step, values)

    def keep(self) -> None:
        """Makes sure that what was logged outlives this process."""
        if self._tracker is not None:
            self._tracker.keep()


class _Checkpoints:
    """Saves a training every few steps, at its end and when it is interrupted, on rank 0."""

    def __init__(self, unit: TransferUnit, config: TrainedConfig, state: TrainingState) -> None:
        self._unit = unit
        self._url, self._every, self._state = (
            join_url(unit.url, "checkpoints"),
            config.checkpoint_every_steps,
            state,
        )
        self._attempt = resume_newest(self._url, state)
        self._saved = state.step

    def follow(
        self, steps: Iterable[LoggedStep], process: TrainingProcess, log: _Log, *, total_steps: int
    ) -> Interrupted | None:
        """Takes the steps to their end, or to an interruption; rank 0 prints now and then how long is left."""
        time_left, printed_s = TimeLeft(total_steps), time.monotonic()
        for step in steps:
            log(*step)
            now_s = time.monotonic()
            left_s = time_left.seconds(step.step, now_s)
            if rank() == 0 and now_s - printed_s >= _LINE_EVERY_S:
                printed_s = now_s
                name = f"{self._unit.job.name} {self._unit.prefix}"
                logger.info(
                    "transfer %s step %d/%d  %s", name, step.step, total_steps, left_text(left_s)
                )
            due = step.step % self._every == 0
            reason = process.interruption(at_checkpoint=due)
            if due or reason:
                self._save(log)
            if reason:
                return Interrupted(reason, step.step)
        log(self._state.step, {})  # also where all steps were done before
        self._save(log)
        return None

    def _save(self, log: _Log) -> None:
        if rank() == 0 and self._saved != self._state.step:
            log.keep()
            save = partial(
                save_checkpoint, self._state, self._url, attempt=self._attempt, keep_last=1
            )
            patiently(save, EVALUATION_PATIENCE_S)
        self._saved = self._state.step


def train_classifier(
    unit: TransferUnit, process: TrainingProcess, log: _Log
) -> TransferResult | Interrupted:
    """Trains a classifier to the end, and measures it on the test split."""
    config, data, device = unit.job.config, unit.job.data, process.device
    assert isinstance(config, ClassifierConfig)
    index = read_index(data.shards, patience_s=EVALUATION_PATIENCE_S)
    splits = (data.train_split, data.test_split)
    check_labels(*(open_split(data.shards, index, split, config.size) for split in splits))
    backbone = unit.backbone().to(device)
    if unit.init == "random" and isinstance(config, LinearClassifierConfig):
        calibrate_batch_norm(backbone, calibration_images(unit, index, config.size))
    state = build_classifier_state(
        config, backbone, len(index.classes), seed=unit.seed, data_digest=index.digest
    )
    checkpoints = _Checkpoints(unit, config, state)
    plan = classifier_plan(config, unit.seed)
    with (
        closing(
            BadSampleFile(join_url(unit.url, "bad_samples", f"rank_{rank():04d}.jsonl"))
        ) as bad_samples,
        closing(
            batches(
                data.shards,
                index,
                data.train_split,
                plan,
                rank=rank(),
                world_size=world_size(),
                start=state.position,
                device=device,
                bad_samples=bad_samples,
            )
        ) as source,
    ):
        per_epoch = steps_per_epoch(index, data.train_split, plan)
        steps = classifier_steps(state, source, per_epoch)
        interrupted = checkpoints.follow(steps, process, log, total_steps=config.epochs * per_epoch)
    if interrupted:
        return interrupted
    scores = classify(state, data.shards, index.split(data.test_split))
    return classification_result(
        count_predictions(scores.logits, scores.labels), index.classes, also={}
    )


def train_detector(
    unit: TransferUnit, process: TrainingProcess, log: _Log
) -> TransferResult | Interrupted:
    """Trains a detector to the end, and measures it on the test split."""
    config, data = unit.job.config, unit.job.data
    assert isinstance(config, DetectionConfig)
    index = read_index(data.shards, patience_s=EVALUATION_PATIENCE_S)
    masks = isinstance(config, MaskRcnnConfig)
    train, test = (
        load_detection_samples(data.shards, index, split, masks=masks)
        for split in (data.train_split, data.test_split)
    )
    state = build_detection_state(
        config,
        unit.backbone(),
        index.categories,
        process.device,
        seed=unit.seed,
        data_digest=index.digest,
    )
    steps = detection_steps(state, train.samples, sorted_category_ids(index.categories))
    total_steps = scaled_schedule(config).steps
    interrupted = _Checkpoints(unit, config, state).follow(
        steps, process, log, total_steps=total_steps
    )
    if interrupted:
        return interrupted
    result = evaluate_detector(state, train.samples, test.samples, index.categories)
    counts = {
        f"{split}/{name}": count
        for split, found in (("train", train), ("test", test))
        for name, count in found.counts.items()
    }
    return dataclasses.replace(result, metrics=result.metrics | counts)
