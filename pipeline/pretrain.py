"""The pretraining stage, from a config to a backbone.

`pretrain_worker` is the loop around `hemoco.train.pretrain.train_steps`: what is logged, exported
and saved, and when the training stops.
"""

import dataclasses
import logging
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing

import torch

from hemoco.backbones import file
from hemoco.config import DataConfig, PretrainConfig
from hemoco.data.labelled import load_images
from hemoco.data.shards.index import ShardIndex, read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import Batch, batches, pretraining_plan, steps_per_epoch
from hemoco.data.stream.loader import StreamPosition
from hemoco.distributed import rank, world_size
from hemoco.errors import HemocoError, TrainingError
from hemoco.features.extract import extract_features
from hemoco.features.sample import FILE_NAME, encode_sample, sample_features
from hemoco.models.resnet import Backbone
from hemoco.storage.objects import join_url
from hemoco.storage.retry import patiently
from hemoco.tracking.metric_queue import Tracker, check_delivered
from hemoco.tracking.runs import log_artifact_bytes
from hemoco.tracking.system_metrics import SystemMetrics
from hemoco.train import checkpoint
from hemoco.train.pretrain import StepMetrics, TrainState, build_state, train_steps
from hemoco.transfer.classification.knn import knn_accuracy
from pipeline.time_left import TimeLeft, left_text
from pipeline.workers.group import GroupSize, run_workers
from pipeline.workers.interruption import TrainingProcess
from pipeline.workers.stop_request import watched_request
from pipeline.workers.tasks import Interrupted

logger = logging.getLogger(__name__)

BACKBONES = "backbones"
"""Name of the folder of the backbones that are exported during a pretraining."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """Everything the workers of one pretraining need; it can be pickled."""

    config: PretrainConfig
    data: DataConfig
    url: str
    """URL of this pretraining's folder, which receives checkpoints/ and backbone.safetensors."""
    tracking_uri: str
    run_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A finished pretraining: its backbone and the last values of its metrics."""

    run_id: str
    backbone_url: str
    metrics: dict[str, float]


def pretrain(job: PretrainJob, size: GroupSize) -> Pretrained:
    """Trains on Ray to the end, resuming from the newest checkpoint after a loss of workers."""
    result = run_workers(pretrain_worker, job, name="pretrain", size=size, storage=job.url)
    assert isinstance(result, Pretrained)
    return result


def pretrain_worker(job: PretrainJob, process: TrainingProcess) -> Pretrained | Interrupted:
    """Resumes and trains; every training process runs it, and all ranks return the same.

    Raises:
        TrainingError: the loss is not finite.
        StoppedError: a stop was requested (`pipeline.workers.stop_request`).
        TrackingError: MLflow has not accepted all metrics.
    """
    config, device = job.config, process.device
    index = read_index(job.data.shards, patience_s=config.stream.retry_s)
    per_epoch = steps_per_epoch(index, job.data.pretrain_split, pretraining_plan(config))
    state = build_state(config, device, data_digest=index.digest)
    folder = join_url(job.url, "checkpoints")
    attempt = checkpoint.resume_newest(folder, state)
    knn = _OnlineKnn(job, index, device) if rank() == 0 and config.knn_every_epochs else None
    last: dict[str, float] = {}
    total_steps = config.epochs * per_epoch
    time_left = TimeLeft(total_steps)
    bad_samples_url = join_url(job.url, "bad_samples", f"rank_{rank():04d}.jsonl")
    with ExitStack() as stack:
        tracker = None
        if rank() == 0:
            tracker = stack.enter_context(_tracker(job))
            stack.enter_context(SystemMetrics(job.tracking_uri, job.run_id, tracker))
        bad_samples = stack.enter_context(closing(BadSampleFile(bad_samples_url)))
        source = stack.enter_context(
            closing(_batches(job, index, state.position, device, bad_samples))
        )
        request = stack.enter_context(watched_request(job.url))
        for metrics in _naming_checkpoint(train_steps(state, source, per_epoch), folder):
            values = dict(metrics.values)
            if knn is not None and _ends_epoch(
                metrics.step, per_epoch, config, every=config.knn_every_epochs
            ):
                values |= knn(state)
            left_s = time_left.seconds(metrics.step, time.monotonic())
            if values and tracker is not None:
                tracker.log(metrics.step, values)
                logger.info("%s  %s", _progress(metrics, values, total_steps), left_text(left_s))
            last |= values
            if rank() == 0 and _ends_epoch(
                metrics.step, per_epoch, config, every=config.export_every_epochs
            ):
                _export(job, state, epoch_backbone(job.url, metrics.step // per_epoch))
            due = metrics.step % config.checkpoint_every_steps == 0
            # a collective: every rank must get here, at the same steps
            reason = process.interruption(at_checkpoint=due, stop=request.seen.is_set())
            if reason == "stopped":
                raise request.error(metrics.step // per_epoch)
            if due or reason:
                bad_samples.write()
                if tracker is not None:
                    # Metrics first: those of the steps before a checkpoint are not computed again.
                    tracker.keep()
                    _save(state, folder, attempt, config)
            if reason:
                return Interrupted(reason, metrics.step)
    url = join_url(job.url, "backbone.safetensors")
    if rank() == 0:
        _export(job, state, url)
        _record_sample(job, state, index)
    if tracker is not None:
        check_delivered(tracker)
    return Pretrained(run_id=job.run_id, backbone_url=url, metrics=last)


def epoch_backbone(url: str, epoch: int) -> str:
    """Returns the URL of the backbone after an epoch, below the folder of a pretraining."""
    return join_url(url, BACKBONES, f"epoch_{epoch:04d}.safetensors")


def _tracker(job: PretrainJob) -> Tracker:
    return Tracker(job.tracking_uri, job.run_id, join_url(job.url, "unsent_metrics", job.run_id))


def _save(state: TrainState, folder: str, attempt: int, config: PretrainConfig) -> None:
    def save() -> None:
        checkpoint.save_checkpoint(
            state,
            folder,
            attempt=attempt,
            keep_last=config.keep_last,
            keep_every_steps=config.keep_every_steps,
        )

    patiently(save, config.stream.retry_s)


def _naming_checkpoint(steps: Iterator[StepMetrics], folder: str) -> Iterator[StepMetrics]:
    """Yields the steps; an error of the training gets the URL of the last good checkpoint."""
    try:
        yield from steps
    except TrainingError as error:
        try:
            left = checkpoint.newest_checkpoint(folder) or "there is none yet"
        except (HemocoError, MemoryError) as other:
            left = f"unknown ({other})"
        raise TrainingError(f"{error}; the last good checkpoint: {left}") from error


def _batches(
    job: PretrainJob,
    index: ShardIndex,
    start: StreamPosition | None,
    device: torch.device,
    bad_samples: BadSampleFile,
) -> Generator[Batch, None, None]:
    return batches(
        job.data.shards,
        index,
        job.data.pretrain_split,
        pretraining_plan(job.config),
        rank=rank(),
        world_size=world_size(),
        start=start,
        device=device,
        bad_samples=bad_samples,
    )


def _ends_epoch(step: int, per_epoch: int, config: PretrainConfig, *, every: int) -> bool:
    """Returns whether a step ends the last epoch or one whose number is a multiple of `every`.

    If `every` is 0, no step does.
    """
    epoch, rest = divmod(step, per_epoch)
    return every > 0 and rest == 0 and (epoch % every == 0 or epoch == config.epochs)


class _OnlineKnn:
    """Measures the kNN accuracy of the query encoder; it reads the images once, when it is made."""

    def __init__(self, job: PretrainJob, index: ShardIndex, device: torch.device) -> None:
        self.device = device
        data, size = job.data, job.config.views.size
        self.bank, self.bank_labels, _ = load_images(data.shards, index, data.train_split, size)
        self.queries, self.query_labels, _ = load_images(data.shards, index, data.test_split, size)
        self.views = job.config.views

    def __call__(self, state: TrainState) -> dict[str, float]:
        encoder = state.model.query_encoder.encoder
        views = self.views
        backbone = Backbone(encoder, state.config.encoder, views.mean, views.std).to(self.device)
        encoder.eval()
        bank = extract_features(backbone, self.bank)  # (images, D)
        queries = extract_features(backbone, self.queries)  # (images, D)
        encoder.train()
        # 200 as in the papers, fewer where 200 would be most of a class
        neighbours = min(200, len(bank) // 10)
        accuracy = knn_accuracy(
            bank,
            self.bank_labels,
            queries,
            self.query_labels,
            neighbours=neighbours,
            temperature=0.1,
        )
        return {"knn_top1": accuracy}


def _progress(metrics: StepMetrics, values: dict[str, float], total: int) -> str:
    shown = "  ".join(
        f"{name} {value:.3f}" for name, value in values.items() if name in ("loss", "knn_top1")
    )
    return f"pretrain step {metrics.step}/{total}  epoch {metrics.epoch}  {shown}"


def _export(job: PretrainJob, state: TrainState, url: str) -> None:
    backbone = _backbone(job, state)
    metadata = {
        "data_digest": state.data_digest,
        "run_id": job.run_id,
        "size": str(job.config.views.size),
    }
    patiently(lambda: file.export_backbone(backbone, url, metadata), job.config.stream.retry_s)


def _record_sample(job: PretrainJob, state: TrainState, index: ShardIndex) -> None:
    """Stores the features of some images with the run, for the report's feature map."""
    data, encoder = job.data, state.model.query_encoder.encoder
    split = data.test_split if data.test_split in index.splits else data.pretrain_split
    backbone = _backbone(job, state).to(next(encoder.parameters()).device)
    try:
        sample = sample_features(backbone, data.shards, index, split, job.config.views.size)
        log_artifact_bytes(job.tracking_uri, job.run_id, FILE_NAME, encode_sample(sample))
    except Exception as error:
        # of storage, MLflow, CUDA or memory: the backbone is already exported, and a map is not
        # worth failing the pretraining
        logger.warning("event=no_feature_sample the report will have no feature map: %s", error)


def _backbone(job: PretrainJob, state: TrainState) -> Backbone:
    views = job.config.views
    return Backbone(state.model.query_encoder.encoder, job.config.encoder, views.mean, views.std)
