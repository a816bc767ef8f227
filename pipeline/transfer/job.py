"""What one transfer needs, and the recording of what it measured."""

import dataclasses

from torch import Tensor

from hemoco.backbones.inits import init_backbone
from hemoco.config import DataConfig, EncoderConfig, TransferConfig, ViewsConfig, init_label
from hemoco.data.labelled import some_images
from hemoco.data.shards.index import ShardIndex
from hemoco.features.extract import CALIBRATION_IMAGES
from hemoco.models.resnet import Backbone
from hemoco.storage.objects import join_url
from hemoco.tracking.metric_queue import Tracker, check_delivered
from hemoco.tracking.runs import log_artifact_bytes, run_facts, set_tags
from hemoco.tracking.system_metrics import machine_facts
from hemoco.tracking.tags import Tag
from hemoco.transfer.result import TransferResult


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
    url: str
    """Folder of this transfer, for checkpoints."""
    tracking_uri: str
    run_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferUnit:
    """One init and one seed of a transfer: what is measured, done or not done, as a whole."""

    job: TransferJob
    init: str
    seed: int

    @property
    def prefix(self) -> str:
        """Of its metrics' names."""
        return f"{init_label(self.init)}/seed_{self.seed}"

    @property
    def url(self) -> str:
        """Its folder."""
        return join_url(self.job.url, f"{init_label(self.init)}_seed_{self.seed}")

    def backbone(self) -> Backbone:
        """What it starts from, on the CPU."""
        return init_backbone(
            self.init, self.job.backbone_url, self.job.encoder, self.job.views, self.seed
        )


def calibration_images(unit: TransferUnit, index: ShardIndex, size: int) -> Tensor:
    """Training images (M, 3, S, S) of that size S, to calibrate a random backbone by that stays frozen."""
    data = unit.job.data
    return some_images(data.shards, index, data.train_split, size=size, count=CALIBRATION_IMAGES)


def open_units(job: TransferJob) -> list[TransferUnit]:
    """The inits and seeds that are not yet recorded."""
    done = run_facts(job.tracking_uri, job.run_id).tags
    every = [
        TransferUnit(job=job, init=init, seed=seed)
        for init in job.config.inits
        for seed in job.config.seeds
    ]
    return [unit for unit in every if _done_tag(unit) not in done]


def begin_attempt(unit: TransferUnit) -> None:
    """Counts the starts of a unit in the tag `hemoco.attempt/INIT/seed_N` of its run, which learns of the machine."""
    tag = f"{Tag.ATTEMPT_PREFIX}{unit.prefix}"
    before = run_facts(unit.job.tracking_uri, unit.job.run_id).tags.get(tag, "0")
    set_tags(unit.job.tracking_uri, unit.job.run_id, {tag: str(int(before) + 1)} | machine_facts())


def unit_tracker(unit: TransferUnit) -> Tracker:
    """Sends a unit's metrics; what MLflow does not take is kept in the unit's folder."""
    job = unit.job
    return Tracker(job.tracking_uri, job.run_id, join_url(unit.url, "unsent_metrics", job.run_id))


def log_values(tracker: Tracker, unit: TransferUnit, step: int, values: dict[str, float]) -> None:
    """Sends a unit's values to MLflow under its prefix."""
    tracker.log(step, {f"{unit.prefix}/{name}": value for name, value in values.items()})


def record_result(unit: TransferUnit, result: TransferResult, last_step: int) -> None:
    """Sends what a unit measured to MLflow, metrics and files, and then marks it as done.

    Args:
        unit: that was measured.
        result: its history included.
        last_step: at which the final metrics are recorded.

    Raises:
        TrackingError: MLflow did not take all of it; the unit is not done then.
    """
    job = unit.job
    with unit_tracker(unit) as tracker:
        for step, values in result.history:
            log_values(tracker, unit, step, values)
        log_values(tracker, unit, last_step, result.metrics)
    check_delivered(tracker)
    flat = unit.prefix.replace("/", "_")
    files = {f"{name}.png": png for name, png in result.images.items()} | result.files
    for name, content in files.items():
        log_artifact_bytes(job.tracking_uri, job.run_id, f"{flat}_{name}", content)
    set_tags(job.tracking_uri, job.run_id, {_done_tag(unit): "true"})


def result_line(unit: TransferUnit, result: TransferResult) -> str:
    """What a unit measured, for a person who waits."""
    return f"{unit.job.name} {unit.prefix}: {result.metric} {result.value:.4f}"


def _done_tag(unit: TransferUnit) -> str:
    return f"{Tag.DONE_PREFIX}{unit.prefix}"
