"""Values that describe one transfer and its units, and the recording of their results."""

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
    """Everything one transfer needs; it can be pickled."""

    name: str
    config: TransferConfig
    data: DataConfig
    """The transfer's own data or the recipe's; `shards` is set."""
    backbone_url: str
    encoder: EncoderConfig
    views: ViewsConfig
    """The views of the pretraining, for their image size and normalisation."""
    url: str
    """URL of this transfer's folder, which has its checkpoints."""
    tracking_uri: str
    run_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferUnit:
    """One init and one seed of a transfer, which is measured and recorded as a whole."""

    job: TransferJob
    init: str
    seed: int

    @property
    def prefix(self) -> str:
        """Prefix of the names of its metrics, INIT/seed_N."""
        return f"{init_label(self.init)}/seed_{self.seed}"

    @property
    def url(self) -> str:
        """URL of its folder."""
        return join_url(self.job.url, f"{init_label(self.init)}_seed_{self.seed}")

    def backbone(self) -> Backbone:
        """Loads or draws the backbone that it starts from, on the CPU."""
        return init_backbone(
            self.init, self.job.backbone_url, self.job.encoder, self.job.views, self.seed
        )


def calibration_images(unit: TransferUnit, index: ShardIndex, size: int) -> Tensor:
    """Returns training images to calibrate the BN statistics of a frozen random backbone.

    Args:
        unit: the unit of the backbone.
        index: index of the transfer's shards.
        size: side length S of the images, in pixels.

    Returns:
        Images (M, 3, S, S).
    """
    data = unit.job.data
    return some_images(data.shards, index, data.train_split, size=size, count=CALIBRATION_IMAGES)


def open_units(job: TransferJob) -> list[TransferUnit]:
    """Returns the units that are not yet recorded as done."""
    done = run_facts(job.tracking_uri, job.run_id).tags
    units = [
        TransferUnit(job=job, init=init, seed=seed)
        for init in job.config.inits
        for seed in job.config.seeds
    ]
    return [unit for unit in units if _done_tag(unit) not in done]


def begin_attempt(unit: TransferUnit) -> None:
    """Counts a start of a unit in the tag `hemoco.attempt/INIT/seed_N`, and tags the machine."""
    tag = f"{Tag.ATTEMPT_PREFIX}{unit.prefix}"
    before = run_facts(unit.job.tracking_uri, unit.job.run_id).tags.get(tag, "0")
    set_tags(unit.job.tracking_uri, unit.job.run_id, {tag: str(int(before) + 1)} | machine_facts())


def unit_tracker(unit: TransferUnit) -> Tracker:
    """Returns a tracker of a unit's metrics, which its folder keeps if MLflow refuses them."""
    job = unit.job
    return Tracker(job.tracking_uri, job.run_id, join_url(unit.url, "unsent_metrics", job.run_id))


def log_values(tracker: Tracker, unit: TransferUnit, step: int, values: dict[str, float]) -> None:
    """Logs a unit's values under its prefix."""
    tracker.log(step, {f"{unit.prefix}/{name}": value for name, value in values.items()})


def record_result(unit: TransferUnit, result: TransferResult, last_step: int) -> None:
    """Sends a unit's metrics and files to MLflow, and then marks the unit as done.

    Args:
        unit: the measured unit.
        result: its result, with the history of its training.
        last_step: step of the final metrics.

    Raises:
        TrackingError: MLflow did not accept all of it; the unit is not marked as done.
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
    """Returns a unit's headline result as a line of the log."""
    return f"{unit.job.name} {unit.prefix}: {result.metric} {result.value:.4f}"


def _done_tag(unit: TransferUnit) -> str:
    return f"{Tag.DONE_PREFIX}{unit.prefix}"
