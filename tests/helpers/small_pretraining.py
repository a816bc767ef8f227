"""A pretraining of eight steps in this process, with a checkpoint at every second one.

An action can be called after a step, for example one that damages the host's disk.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from mlflow import MlflowClient

from hemoco.backbones.file import load_backbone
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    MoCoConfig,
    PretrainConfig,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.tracking.client import connect
from hemoco.tracking.runs import open_run
from pipeline.pretrain import PretrainJob
from pipeline.workers.interruption import TrainingProcess
from pipeline.workers.tasks import Reason
from tests.helpers.shard_folders import write_shards

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    epochs=1,
    global_batch_size=16,
    log_every_steps=1,
    checkpoint_every_steps=2,
    knn_every_epochs=0,
    export_every_epochs=0,
    views=ViewsConfig(size=16),
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=8, queue_length=64, bn_group_size=4),
    stream=StreamConfig(workers=0, lanes=4),
)


class Troubled(TrainingProcess):
    """A training process that calls an action after a step, before its checkpoint is written."""

    def __init__(self, trouble: Callable[[], None] = lambda: None, *, after: int = 4) -> None:
        super().__init__(CPU, ResourcesConfig(), [1])
        self._trouble, self._left = trouble, after

    def interruption(self, *, at_checkpoint: bool, stop: bool = False) -> Reason | None:
        self._left -= 1
        if self._left == 0:
            self._trouble()
        return super().interruption(at_checkpoint=at_checkpoint, stop=stop)


def write_images(folder: Path) -> str:
    """Writes shards for the pretraining; returns their URL."""
    return write_shards(folder.as_uri(), [32, 32, 32, 32])


def new_job(shards: str, tracking: str, url: str) -> PretrainJob:
    """Returns the pretraining's job, with a new run in MLflow."""
    run_id = open_run(
        tracking, connect(tracking), name=uuid.uuid4().hex, parent=None, tags={}, params={}
    )
    return PretrainJob(
        config=CONFIG, data=DataConfig(shards=shards), url=url, tracking_uri=tracking, run_id=run_id
    )


def same_result(job: PretrainJob, other: PretrainJob) -> bool:
    """Returns whether backbones and the losses of all attempts are equal, bit for bit."""
    found, wanted = (
        load_backbone(f"{each.url}/backbone.safetensors").state_dict() for each in (job, other)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    return losses(job) == losses(other)


def losses(job: PretrainJob) -> set[tuple[int, float]]:
    history = MlflowClient(job.tracking_uri).get_metric_history(job.run_id, "loss")
    return {(point.step, point.value) for point in history}


def python(*words: str, before: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python in the checkout, prefixed by a shell command."""
    command = [sys.executable, *words]
    if before:
        command = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
