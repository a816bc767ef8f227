"""Training and measuring one unit of a trained transfer, in a Ray task or as ranks of Ray Train.

A unit that is started again resumes from its newest checkpoint.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, nullcontext
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
"""Seconds between two progress lines in the log."""
_LESS_MEMORY = (
    "take more workers for this transfer or machines with more memory; "
    "the same command resumes it from the last checkpoint"
)


def train_as_rank(unit: TransferUnit, process: TrainingProcess) -> list[str] | Interrupted:
    """Trains a unit as one of several processes of Ray Train; returns its result as one line."""
    if rank() == 0:
        begin_attempt(unit)
    return _train(unit, process)


def train_alone(unit: TransferUnit) -> list[str] | Interrupted:
    """Trains a unit in a Ray task; returns its result as one line."""
    config = unit.job.config
    begin_attempt(unit)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)  # Ray prints the lines at the driver
    torch.set_num_threads(config.cpus)
    resources = ResourcesConfig(cpus_per_worker=config.cpus, gpus_per_worker=config.gpus)
    device = torch.device("cuda" if config.gpus else "cpu")
    with sigterm_noted():
        return _train(unit, TrainingProcess(device, resources, [1]))


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
    """Log of a unit's steps; only rank 0 has a tracker and sends the values."""

    def __init__(self, unit: TransferUnit, tracker: Tracker | None) -> None:
        self._unit, self._tracker = unit, tracker
        self.last_step = 0

    def __call__(self, step: int, values: dict[str, float]) -> None:
        self.last_step = step
        if values and self._tracker is not None:
            log_values(self._tracker, self._unit, step, values)

    def keep(self) -> None:
        """Sends what was logged, or writes it to the unit's folder, so that it survives a kill."""
        if self._tracker is not None:
            self._tracker.keep()


class _Checkpoints:
    """Saves a training every few steps, at its end and when it is interrupted, on rank 0."""

    def __init__(self, unit: TransferUnit, config: TrainedConfig, state: TrainingState) -> None:
        self._unit, self._state = unit, state
        self._url = join_url(unit.url, "checkpoints")
        self._every = config.checkpoint_every_steps
        self._attempt = resume_newest(self._url, state)
        self._saved = state.step

    def follow(
        self, steps: Iterable[LoggedStep], process: TrainingProcess, log: _Log, *, total_steps: int
    ) -> Interrupted | None:
        """Runs the steps to their end or to an interruption.

        Rank 0 also prints a progress line from time to time.
        """
        time_left = TimeLeft(total_steps)
        printed_s = time.monotonic()
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
        # Also where a resumed training has no steps left: the results are logged at its last step.
        log(self._state.step, {})
        self._save(log)
        return None

    def _save(self, log: _Log) -> None:
        if rank() == 0 and self._saved != self._state.step:
            log.keep()  # first: values before a checkpoint are not computed again
            save = partial(
                save_checkpoint, self._state, self._url, attempt=self._attempt, keep_last=1
            )
            patiently(save, EVALUATION_PATIENCE_S)
        self._saved = self._state.step


def train_classifier(
    unit: TransferUnit, process: TrainingProcess, log: _Log
) -> TransferResult | Interrupted:
    """Trains a classifier to the end and measures it on the test split."""
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
    bad_samples_url = join_url(unit.url, "bad_samples", f"rank_{rank():04d}.jsonl")
    with ExitStack() as stack:
        bad_samples = stack.enter_context(closing(BadSampleFile(bad_samples_url)))
        stream = batches(
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
        source = stack.enter_context(closing(stream))
        per_epoch = steps_per_epoch(index, data.train_split, plan)
        steps = classifier_steps(state, source, per_epoch)
        interrupted = checkpoints.follow(steps, process, log, total_steps=config.epochs * per_epoch)
    if interrupted:
        return interrupted
    scores = classify(state, data.shards, index.split(data.test_split))
    counts = count_predictions(scores.logits, scores.labels)
    return classification_result(counts, index.classes, also={})


def train_detector(
    unit: TransferUnit, process: TrainingProcess, log: _Log
) -> TransferResult | Interrupted:
    """Trains a detector to the end and measures it on the test split."""
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
    checkpoints = _Checkpoints(unit, config, state)
    interrupted = checkpoints.follow(steps, process, log, total_steps=total_steps)
    if interrupted:
        return interrupted
    result = evaluate_detector(state, train.samples, test.samples, index.categories)
    metrics = dict(result.metrics)
    for split, samples in (("train", train), ("test", test)):
        metrics |= {f"{split}/{name}": count for name, count in samples.counts.items()}
    return dataclasses.replace(result, metrics=metrics)
