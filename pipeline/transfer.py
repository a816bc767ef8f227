"""The transfer stage: one transfer, as one Ray task for each of its inits; it fails as a whole."""

import dataclasses

import torch

from hemoco.checkpoint import load_backbone, random_backbone
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    KnnConfig,
    LinearProbeConfig,
    LowShotConfig,
    MaskRcnnConfig,
    TransferConfig,
    ViewsConfig,
)
from hemoco.data.shards import read_index
from hemoco.data.stream import load_images
from hemoco.encoder import Backbone
from hemoco.knn import run_knn
from hemoco.tracking import Tracker, log_artifact_bytes
from hemoco.transfer.detection import load_detection_samples, run_mask_rcnn
from hemoco.transfer.frozen import calibrate_batch_norm
from hemoco.transfer.linear_probe import run_linear_probe
from hemoco.transfer.low_shot import run_low_shot
from hemoco.transfer.result import LabelledImages, TransferResult
from pipeline.tasks import run_tasks

_PATIENCE_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferJob:
    """All that one transfer needs; pickles."""

    name: str
    config: TransferConfig
    data: DataConfig
    """With `shards` filled in."""
    backbone_url: str
    encoder: EncoderConfig
    views: ViewsConfig
    """Of the pretraining: image size and normalisation."""
    tracking_uri: str
    run_id: str


def measure_transfer(job: TransferJob) -> None:
    """Measures all inits and seeds of a transfer on Ray, the inits side by side; ends when all are done.

    Raises:
        HemocoError: as the first init that failed raised it; the others are cancelled.
    """
    calls = [(job, init) for init in job.config.inits]
    for _ in run_tasks(measure_init, calls, cpus=job.config.cpus, gpus=job.config.gpus):
        pass


def measure_init(job: TransferJob, init: str) -> None:
    """One transfer from one init with all its seeds; its metrics go to the MLflow run `job.run_id`."""
    torch.set_num_threads(job.config.cpus)
    measure = _measurement(job)
    with Tracker(job.tracking_uri, job.run_id) as tracker:
        for seed in job.config.seeds:
            prefix = f"{init}/seed_{seed}"
            result = measure(init, seed)
            for step, values in result.history:
                tracker.log(step, {f"{prefix}/{name}": value for name, value in values.items()})
            last = result.history[-1][0] if result.history else 0
            tracker.log(last, {f"{prefix}/{name}": value for name, value in result.metrics.items()})
            for name, png in result.images.items():
                log_artifact_bytes(job.tracking_uri, job.run_id, f"{init}_seed_{seed}_{name}.png", png)


def headline_metric(config: TransferConfig) -> str:
    """The metric a comparison shows for this kind of transfer."""
    return "mask_ap" if isinstance(config, MaskRcnnConfig) else "top1"


class _Frozen:
    """kNN, linear probe, low-shot: the images are read once, for all seeds."""

    def __init__(self, job: TransferJob) -> None:
        size = job.views.size
        self.job = job
        self.train = LabelledImages(*load_images(job.data.shards, job.data.train_split, size)[:2])
        self.test = LabelledImages(*load_images(job.data.shards, job.data.test_split, size)[:2])

    def __call__(self, init: str, seed: int) -> TransferResult:
        backbone = _backbone(self.job, init, seed)
        if init == "random":
            calibrate_batch_norm(backbone, self.train.images)
        config = self.job.config
        if isinstance(config, KnnConfig):
            return run_knn(config, backbone, self.train, self.test, seed)
        if isinstance(config, LinearProbeConfig):
            return run_linear_probe(config, backbone, self.train, self.test, seed)
        assert isinstance(config, LowShotConfig)
        return run_low_shot(config, backbone, self.train, self.test, seed)


class _MaskRcnn:
    """Mask R-CNN fine-tuning: the scenes are read once, for all seeds."""

    def __init__(self, job: TransferJob, config: MaskRcnnConfig) -> None:
        self.job = job
        self.config = config
        self.categories = read_index(job.data.shards, patience_s=_PATIENCE_S).categories
        self.train = load_detection_samples(job.data.shards, job.data.train_split)
        self.test = load_detection_samples(job.data.shards, job.data.test_split)

    def __call__(self, init: str, seed: int) -> TransferResult:
        backbone = _backbone(self.job, init, seed)
        return run_mask_rcnn(self.config, backbone, self.train, self.test, self.categories, seed)


def _measurement(job: TransferJob) -> _Frozen | _MaskRcnn:
    return _MaskRcnn(job, job.config) if isinstance(job.config, MaskRcnnConfig) else _Frozen(job)


def _backbone(job: TransferJob, init: str, seed: int) -> Backbone:
    if init == "pretrained":
        backbone = load_backbone(job.backbone_url)
    else:
        backbone = random_backbone(job.encoder, seed, job.views.mean, job.views.std)
    return backbone.to("cuda" if job.config.gpus else "cpu")
