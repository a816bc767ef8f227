"""Everything a report shows, read from MLflow alone."""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

from hemoco.config import config_difference
from hemoco.errors import CheckpointError
from hemoco.features.sample import FILE_NAME, FeatureSample, decode_sample
from hemoco.results.comparison import Comparison, Run
from hemoco.results.records import Records
from hemoco.tracking.runs import metric_points, read_artifacts
from hemoco.tracking.tags import Tag
from hemoco.tracking.unsent import MetricPoint

logger = logging.getLogger(__name__)

CURVES = (
    "loss",
    "pretext_top1",
    "embedding_std",
    "effective_rank",
    "positive_similarity",
    "negative_similarity",
    "knn_top1",
    "images_per_s",
    "data_wait",
)
"""Metrics of the pretraining that a report plots."""
_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferImage:
    """A PNG that a transfer recorded."""

    transfer: str
    name: str
    png: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDetail:
    """One of the compared runs, with everything a report shows besides its results."""

    run: Run
    params: dict[str, str]
    """Every setting by its dotted name. Those of `pretrain` are the ones that the backbone was
    trained with, if MLflow has them."""
    curves: dict[str, list[MetricPoint]]
    """Points of the pretraining's metrics by step, for each name in `CURVES`; empty if none."""
    images: tuple[TransferImage, ...]
    sample: FeatureSample | None
    """None if none was recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report shows."""

    comparison: Comparison
    details: tuple[RunDetail, ...]
    """One for each of the comparison's runs, in their order."""

    @property
    def examples(self) -> tuple[RunDetail, ...]:
        """The first run of each pretraining, and repetitions that differ in more than the seed."""
        by_label = {detail.run.label: detail for detail in self.details}
        first = {}
        for column in self.comparison.pretrainings:
            for run in column.runs:
                first[run.label] = by_label[column.runs[0].label]
        return tuple(
            detail
            for detail in self.details
            if detail is first[detail.run.label] or _differ(first[detail.run.label], detail)
        )


def collect_report(uri: str, comparison: Comparison) -> ReportData:
    """Reads the settings, curves and images of a comparison's runs.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    details = tuple(_detail(uri, run) for run in comparison.runs)
    return ReportData(comparison=comparison, details=details)


def _detail(uri: str, run: Run) -> RunDetail:
    images = []
    for facts in run.records.transfers:
        for name, png in sorted(read_artifacts(uri, facts.run_id, ".png").items()):
            image = TransferImage(
                transfer=facts.tags[Tag.TRANSFER], name=name.removesuffix(".png"), png=png
            )
            images.append(image)
    curves: dict[str, list[MetricPoint]] = {name: [] for name in CURVES}
    sample = None
    pretraining = run.records.pretraining
    if pretraining is not None:
        run_id = pretraining.run_id
        recorded = [name for name in CURVES if name in pretraining.metrics]
        # one request to MLflow for each metric, so in parallel
        with ThreadPoolExecutor(_THREADS) as threads:
            histories = threads.map(lambda name: metric_points(uri, run_id, name), recorded)
            curves |= zip(recorded, histories, strict=True)
        file = read_artifacts(uri, run_id, FILE_NAME).get(FILE_NAME)
        sample = _decoded(file) if file is not None else None
    return RunDetail(
        run=run, params=_params(run.records), curves=curves, images=tuple(images), sample=sample
    )


def _differ(first: RunDetail, other: RunDetail) -> bool:
    """Returns whether two runs of one pretraining differ in more than its seed."""
    changed = config_difference(first.params, other.params)
    return any(not change.startswith("pretrain.seed:") for change in changed)


def _params(records: Records) -> dict[str, str]:
    if records.pretraining is not None:
        return records.parent.params | records.pretraining.params
    # The backbone was trained elsewhere. Of `pretrain`, the recipe describes only its architecture
    # and its input; the other settings there are defaults, with which it was not trained.
    described = ("pretrain.encoder.", "pretrain.views.")
    return {
        name: value
        for name, value in records.parent.params.items()
        if not name.startswith("pretrain.") or name.startswith(described)
    }


def _decoded(file: bytes) -> FeatureSample | None:
    try:
        return decode_sample(file)
    except CheckpointError as error:
        logger.warning("event=no_feature_map %s", error)
        return None
