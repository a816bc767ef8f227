"""All that a report shows, read from MLflow and nowhere else."""

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
"""The pretraining's metrics that are drawn."""
_THREADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferImage:
    """A PNG that a transfer recorded."""

    transfer: str
    name: str
    png: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDetail:
    """One of the compared runs, beyond its results."""

    run: Run
    params: dict[str, str]
    """Every setting by its dotted name; those of `pretrain` are the ones the backbone was trained with, if known."""
    curves: dict[str, list[MetricPoint]]
    """The pretraining's metrics by step, by the names of CURVES; empty where not recorded."""
    images: tuple[TransferImage, ...]
    sample: FeatureSample | None
    """None where none was recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report shows."""

    comparison: Comparison
    details: tuple[RunDetail, ...]
    """In the order of its runs."""

    @property
    def examples(self) -> tuple[RunDetail, ...]:
        """Of each pretraining the first run, and those of its repetitions that differ by more than their seed."""
        by_label = {detail.run.label: detail for detail in self.details}
        first = {
            run.label: by_label[column.runs[0].label]
            for column in self.comparison.pretrainings
            for run in column.runs
        }
        return tuple(
            detail
            for detail in self.details
            if detail is first[detail.run.label] or _differ(first[detail.run.label], detail)
        )


def collect_report(uri: str, comparison: Comparison) -> ReportData:
    """The comparison with the settings, curves and images of its runs.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    return ReportData(
        comparison=comparison, details=tuple(_detail(uri, run) for run in comparison.runs)
    )


def _detail(uri: str, run: Run) -> RunDetail:
    records = run.records
    source = records.pretraining
    images = [
        TransferImage(transfer=facts.tags[Tag.TRANSFER], name=name.removesuffix(".png"), png=png)
        for facts in records.transfers
        for name, png in sorted(read_artifacts(uri, facts.run_id, ".png").items())
    ]
    curves: dict[str, list[MetricPoint]] = {name: [] for name in CURVES}
    sample = None
    if source is not None:
        recorded = [name for name in CURVES if name in source.metrics]
        with ThreadPoolExecutor(_THREADS) as threads:
            found = threads.map(lambda name: metric_points(uri, source.run_id, name), recorded)
            curves |= zip(recorded, found, strict=True)
        file = read_artifacts(uri, source.run_id, FILE_NAME).get(FILE_NAME)
        sample = _decoded(file) if file is not None else None
    return RunDetail(
        run=run,
        params=_params(records),
        curves=curves,
        images=tuple(images),
        sample=sample,
    )


def _differ(first: RunDetail, other: RunDetail) -> bool:
    """Whether two runs of one pretraining differ in more than its seed: in what they measure, for example."""
    changed = config_difference(first.params, other.params)
    return any(not change.startswith("pretrain.seed:") for change in changed)


def _params(records: Records) -> dict[str, str]:
    """Of a backbone whose pretraining MLflow does not know, the recipe says what it must be, not how it came to be."""
    if records.pretraining is not None:
        return records.parent.params | records.pretraining.params
    kept = ("pretrain.encoder.", "pretrain.views.")
    return {
        name: value
        for name, value in records.parent.params.items()
        if not name.startswith("pretrain.") or name.startswith(kept)
    }


def _decoded(file: bytes) -> FeatureSample | None:
    try:
        return decode_sample(file)
    except CheckpointError as error:
        logger.warning("event=no_feature_map %s", error)
        return None
