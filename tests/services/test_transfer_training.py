"""Trained transfers as a Ray task runs them, but without Ray: interruption, resuming, records."""

import dataclasses
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from hemoco.backbones.file import backbone_metadata, export_backbone, random_backbone
from hemoco.backbones.inits import check_architecture, init_backbone
from hemoco.config import (
    DataConfig,
    EncoderConfig,
    FineTuneConfig,
    LinearClassifierConfig,
    ResourcesConfig,
    StreamConfig,
    TransferConfig,
    ViewsConfig,
)
from hemoco.errors import CheckpointError, ConfigError
from hemoco.storage.objects import join_url, list_names, write_bytes
from hemoco.tracking.client import connect
from hemoco.tracking.runs import open_run, run_facts
from hemoco.transfer.result import TransferResult
from pipeline.transfer.job import TransferJob, TransferUnit, open_units, record_result
from pipeline.transfer.training import train_alone, train_classifier
from pipeline.workers.interruption import TrainingProcess, sigterm_noted
from pipeline.workers.tasks import Interrupted
from tests.helpers.shard_folders import write_shards

ENCODER = EncoderConfig(architecture="resnet10t", stem="small")
VIEWS = ViewsConfig(size=32)
SMALL: dict[str, Any] = {
    "epochs": 2,
    "global_batch_size": 8,
    "size": 16,
    "resize": 16,
    "lr": 0.05,
    "log_every_steps": 1,
    "checkpoint_every_steps": 3,
    "stream": StreamConfig(workers=0, lanes=2),
}
LINEAR = LinearClassifierConfig(**SMALL)
FINE_TUNE = FineTuneConfig(backbone_lr=0.01, **SMALL)


class Broken(Exception):
    pass


class Recorded:
    """Log like `_Log` that ends the training at a step, or sends SIGTERM to itself after one."""

    def __init__(self, last: int = 10**6, told_after: int = 0) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self._last, self._told_after = last, told_after
        self.last_step = 0

    def keep(self) -> None:
        pass

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if step > self._last:
            raise Broken
        if step == self._told_after:
            os.kill(os.getpid(), signal.SIGTERM)
        self.last_step = step
        if values:
            self.values[step] = values


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TransferJob:
    folder = tmp_path_factory.mktemp("transfer")
    shards = write_shards(str(folder / "shards"), (9, 8, 11, 12))
    export_backbone(
        random_backbone(ENCODER, 7, VIEWS.mean, VIEWS.std),
        str(folder / "b.safetensors"),
        {"data_digest": "", "run_id": ""},
    )
    return TransferJob(
        name="linear",
        config=LINEAR,
        data=DataConfig(shards=shards, test_split="train"),
        backbone_url=str(folder / "b.safetensors"),
        encoder=ENCODER,
        views=VIEWS,
        url=str(folder / "runs"),
        tracking_uri="",
        run_id="",
    )


def unit_of(
    job: TransferJob, config: TransferConfig, folder: Path, init: str = "pretrained"
) -> TransferUnit:
    return TransferUnit(
        job=dataclasses.replace(job, config=config, url=str(folder)), init=init, seed=3
    )


def train(unit: TransferUnit, log: Recorded) -> TransferResult:
    found = begin(unit, log)
    assert isinstance(found, TransferResult)
    return found


def begin(unit: TransferUnit, log: Recorded) -> TransferResult | Interrupted:
    return train_classifier(unit, TrainingProcess(torch.device("cpu"), ResourcesConfig(), [1]), log)  # type: ignore[arg-type]


@pytest.mark.parametrize(("config", "init"), [(LINEAR, "random"), (FINE_TUNE, "pretrained")])
def test_an_interrupted_transfer_goes_on_from_its_checkpoint_to_the_same_result(
    job: TransferJob, config: TransferConfig, init: str, tmp_path: Path
) -> None:
    whole, first, second = Recorded(), Recorded(last=5), Recorded()
    expected = train(unit_of(job, config, tmp_path / "whole", init), whole)
    unit = unit_of(job, config, tmp_path / "broken", init)
    with pytest.raises(Broken):
        train(unit, first)
    found = train(unit, second)
    assert min(second.values) == 4  # the checkpoint is of step 3
    assert first.values | second.values == whole.values
    assert found.metrics == expected.metrics
    again = Recorded()
    assert train(unit, again).metrics == expected.metrics  # only the measurement was lost
    assert again.values == {} and again.last_step == 10


def test_a_transfer_that_is_told_to_go_away_saves_the_step_it_is_at(
    job: TransferJob, tmp_path: Path
) -> None:
    whole, first, second = Recorded(), Recorded(told_after=5), Recorded()
    expected = train(unit_of(job, LINEAR, tmp_path / "whole"), whole)
    unit = unit_of(job, LINEAR, tmp_path / "told")
    with sigterm_noted():
        assert begin(unit, first) == Interrupted("preempted", 5)
    assert train(unit, second).metrics == expected.metrics
    assert (max(first.values), min(second.values)) == (5, 6)


def test_the_last_checkpoint_of_a_transfer_is_kept(job: TransferJob, tmp_path: Path) -> None:
    unit = unit_of(job, LINEAR, tmp_path)
    train(unit, Recorded())
    assert list_names(join_url(unit.url, "checkpoints")) == ["step_00000010_a0"]


def tracked(job: TransferJob, uri: str, config: TransferConfig, folder: Path) -> TransferJob:
    run_id = open_run(uri, connect(uri), name=uuid.uuid4().hex, parent=None, tags={}, params={})
    return dataclasses.replace(job, config=config, url=str(folder), tracking_uri=uri, run_id=run_id)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_a_recorded_unit_is_not_measured_again(
    job: TransferJob, tracking: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        LINEAR, seeds=(0, 1), inits=("pretrained", f"other={job.backbone_url}")
    )
    made = tracked(job, tracking, config, tmp_path)
    units = open_units(made)
    assert [unit.prefix for unit in units] == [
        *("pretrained/seed_0", "pretrained/seed_1", "other/seed_0", "other/seed_1"),
    ]
    result = TransferResult(
        metric="top1", value=0.5, metrics={"top1": 0.5}, files={"classes.csv": b"a,b\n"}
    )
    record_result(units[2], result, 7)
    assert [unit.prefix for unit in open_units(made)] == [
        *("pretrained/seed_0", "pretrained/seed_1", "other/seed_1"),
    ]
    assert run_facts(tracking, made.run_id).metrics == {"other/seed_0/top1": 0.5}


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
def test_what_a_task_measures_is_in_mlflow(job: TransferJob, tracking: str, tmp_path: Path) -> None:
    made = tracked(job, tracking, LINEAR, tmp_path)
    train_alone(open_units(made)[0])
    metrics = run_facts(tracking, made.run_id).metrics
    assert {
        f"pretrained/seed_0/{name}" for name in ("top1", "per_class_accuracy", "train_loss", "lr")
    } <= set(metrics)
    assert [unit.prefix for unit in open_units(made)] == ["random/seed_0"]


def test_inits_give_the_backbones_they_name(job: TransferJob) -> None:
    expected = {
        "pretrained": random_backbone(ENCODER, 7, VIEWS.mean, VIEWS.std),
        f"mine={job.backbone_url}": random_backbone(ENCODER, 7, VIEWS.mean, VIEWS.std),
        "random": random_backbone(ENCODER, 5, VIEWS.mean, VIEWS.std),
    }
    for init, backbone in expected.items():
        found = init_backbone(init, job.backbone_url, ENCODER, VIEWS, 5).state_dict()
        assert all(
            torch.equal(found[name], tensor) for name, tensor in backbone.state_dict().items()
        )


def test_a_backbone_of_another_architecture_is_refused_with_the_setting_to_change(
    job: TransferJob, tmp_path: Path
) -> None:
    metadata = backbone_metadata(job.backbone_url)
    check_architecture(job.backbone_url, metadata, ENCODER)
    for other in (
        EncoderConfig(architecture="resnet18", stem="small"),
        EncoderConfig(architecture="resnet10t"),
    ):
        with pytest.raises(
            ConfigError, match=r"set --pretrain\.encoder\.(architecture resnet10t|stem small)"
        ):
            check_architecture(job.backbone_url, metadata, other)
    write_bytes(str(tmp_path / "x.safetensors"), b"no")
    with pytest.raises(CheckpointError):
        backbone_metadata(str(tmp_path / "x.safetensors"))


def test_supervised_weights_that_cannot_fit_are_refused(job: TransferJob) -> None:
    with pytest.raises(ConfigError, match="not of one with the small stem"):
        init_backbone("supervised", "", ENCODER, VIEWS, 0)


@pytest.mark.parametrize(
    "inits", [(), ("pretrained", "pretrained"), ("other",), ("random=s3://x",), ("a b=s3://x",)]
)
def test_inits_that_are_none_are_refused(inits: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"transfers\.inits"):
        TransferConfig(inits=inits)
