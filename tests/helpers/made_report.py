"""A finished run in MLflow, with everything that a report shows."""

import io

from PIL import Image

from hemoco.config import (
    KnnConfig,
    LinearProbeConfig,
    LowShotConfig,
    MoCoConfig,
    PretrainConfig,
    Recipe,
)
from hemoco.features.sample import FILE_NAME, encode_sample
from hemoco.report.data import ReportData, collect_report
from hemoco.results.comparison import compare_runs
from hemoco.tracking.runs import log_artifact_bytes
from tests.helpers.feature_samples import sample_of
from tests.helpers.made_runs import MadeRun, log_curve, log_rate, write_transfer

RECIPE = Recipe(
    name="cells",
    pretrain=PretrainConfig(
        epochs=4,
        global_batch_size=32,
        knn_every_epochs=2,
        moco=MoCoConfig(queue_length=1024, bn_group_size=16),
    ),
    transfers={
        "knn": KnnConfig(seeds=(0, 1)),
        "few": LowShotConfig(fraction=0.01, seeds=(0, 1)),
        "probe": LinearProbeConfig(seeds=(0, 1)),
    },
)


VALUES = {
    ("pretrained", 0): 0.75,
    ("pretrained", 1): 0.5,
    ("random", 0): 0.25,
    ("random", 1): 0.125,
}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def fill(run: MadeRun) -> None:
    """Writes everything that a finished run has, and a transfer that failed."""
    log_curve(run, "loss", {step: 6 - step / 10 for step in range(1, 28)})
    for name, value in (
        ("embedding_std", 0.875),
        ("effective_rank", 9.0),
        ("pretext_top1", 0.5),
        ("data_wait", 0.1),
    ):
        log_curve(run, name, {10: value / 2, 20: value})
    log_curve(run, "positive_similarity", {10: 0.5, 20: 0.75})
    log_curve(run, "negative_similarity", {10: 0.25, 20: 0.0})
    log_rate(run, step=32, at_s=40, images_per_s=100)
    log_rate(run, step=64, at_s=1040, images_per_s=100)
    write_transfer(run, "knn", VALUES)
    write_transfer(run, "few", VALUES, labelled=50)
    transfer = write_transfer(run, "probe", {}, error="<script>alert(1)</script>")
    log_artifact_bytes(run.uri, transfer, "pretrained_seed_0_detections.png", png())
    log_artifact_bytes(run.uri, transfer, "pretrained_seed_0_confusion.png", png())
    log_artifact_bytes(run.uri, run.pretraining, FILE_NAME, encode_sample(sample_of(24)))


def collected(*some: MadeRun) -> ReportData:
    return collect_report(some[0].uri, compare_runs(some[0].uri, [run.name for run in some]))
