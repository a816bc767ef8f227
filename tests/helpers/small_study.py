"""A small run with digits on S3, a pretraining of 2 workers and five transfers, and its records."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from hemoco.config import (
    DataConfig,
    EncoderConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.storage.objects import join_url
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.runs import RunFacts, find_run
from jobs.demo_data import write_digits
from tests.helpers.whole_stages import pack

INTERVAL = 5
"""Steps between two checkpoints."""


def pack_digits(s3: str, folder: Path) -> str:
    """Packs the digits; returns the URL of the shards."""
    write_digits(folder, 0)
    url = join_url(s3, f"{folder.parent.name}/{folder.name}")
    pack((str(folder),), url, split="train", samples_per_shard=500, seed=0)
    return url


def small_recipe(shards: str) -> Recipe:
    """Returns a recipe with timm's smallest ResNet: its steps cost less than its start."""
    pretrain = PretrainConfig(
        epochs=1,
        global_batch_size=128,
        log_every_steps=1,
        checkpoint_every_steps=INTERVAL,
        knn_every_epochs=0,
        export_every_epochs=1,
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(architecture="test_resnet"),
        moco=MoCoConfig(queue_length=512, bn_group_size=16),
        optimizer=OptimizerConfig(lr=0.05),
        stream=StreamConfig(workers=1, lanes=8),
        resources=ResourcesConfig(workers=2),
    )
    trained: dict[str, Any] = {
        "epochs": 1,
        "global_batch_size": 64,
        "size": 32,
        "resize": 32,
        "stream": StreamConfig(workers=0, lanes=8),
    }
    transfers = {
        "knn": KnnConfig(neighbours=20),
        "linear_probe": LinearProbeConfig(epochs=5),
        "low_shot": LowShotConfig(draws=2),
        "linear": LinearClassifierConfig(lr=1.0, inits=("random",), **trained),
        "fine_tune": FineTuneConfig(workers=2, inits=("pretrained",), **trained),
    }
    return Recipe(
        name="small",
        data=DataConfig(shards=shards),
        pretrain=pretrain,
        transfers=transfers,
        curve=("knn",),
    )


def child(run: str, phase: str, **tags: str) -> RunFacts:
    """Returns the newest MLflow run of a phase."""
    uri = tracking_uri()
    wanted = {"hemoco.run": run, "hemoco.phase": phase} | {
        f"hemoco.{name}": value for name, value in tags.items()
    }
    found = find_run(uri, connect(uri), wanted)
    assert found is not None
    return found


def losses(run: str) -> list[tuple[int, float]]:
    """Returns every recorded (step, loss); repeated steps occur several times."""
    history = MlflowClient(tracking_uri()).get_metric_history(child(run, "pretrain").run_id, "loss")
    return [(point.step, point.value) for point in history]
