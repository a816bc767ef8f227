"""A recipe with a sweep, and records of its trials in MLflow."""

import time

from hemoco.config import (
    Choice,
    EncoderConfig,
    KnnConfig,
    LinearProbeConfig,
    LogUniform,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    StreamConfig,
    SweepConfig,
    Uniform,
    ViewsConfig,
)
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.unsent import MetricPoint

LR, TEMPERATURE = "pretrain.optimizer.lr", "pretrain.moco.temperature"
SPACE = {
    LR: LogUniform(0.01, 1.0),
    TEMPERATURE: Uniform(0.1, 0.4),
    "pretrain.moco.head": Choice(("linear", "mlp")),
}
SWEEP = SweepConfig(space=SPACE, objective="knn", trials=6)
RECIPE = Recipe(
    name="swept",
    pretrain=PretrainConfig(
        epochs=8,
        global_batch_size=64,
        log_every_steps=4,
        checkpoint_every_steps=100,
        knn_every_epochs=1,
        views=ViewsConfig(size=32, crop_scale=(0.5, 1.0), flip=0.0),
        encoder=EncoderConfig(architecture="resnet10t"),
        moco=MoCoConfig(
            head="mlp_bn", queue_length=256, momentum=0.99, temperature=0.1, bn_group_size=32
        ),
        optimizer=OptimizerConfig(lr=0.03, weight_decay=5e-4),
        stream=StreamConfig(workers=0, lanes=8),
    ),
    transfers={"knn": KnnConfig(neighbours=20), "linear_probe": LinearProbeConfig(epochs=5)},
    sweep=SWEEP,
)


def record(uri, run_id, key, points):
    now = time.time_ns() // 1_000_000
    send_points(
        uri,
        run_id,
        [MetricPoint(key=key, value=value, timestamp=now, step=step) for step, value in points],
    )
