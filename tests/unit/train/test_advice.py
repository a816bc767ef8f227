"""Warnings about settings, and the size of a checkpoint."""

import dataclasses
import io

import torch

from hemoco.config import (
    EncoderConfig,
    MoCoConfig,
    MoCoV3Config,
    OptimizerConfig,
    PretrainConfig,
    StreamConfig,
)
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.train.advice import checkpoint_bytes, doubtful_settings
from hemoco.train.pretrain import build_state, train_steps

CONFIG = PretrainConfig(
    epochs=1,
    global_batch_size=8,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=16, queue_length=64, momentum=0.9, bn_group_size=4),
    stream=StreamConfig(lanes=1),
)


def with_moco(**changes: object) -> PretrainConfig:
    return dataclasses.replace(CONFIG, moco=dataclasses.replace(CONFIG.moco, **changes))  # type: ignore[arg-type]


def test_settings_that_suit_the_data_are_not_doubted() -> None:
    assert doubtful_settings(CONFIG, 200) == []
    assert doubtful_settings(PretrainConfig(), 5004) == []  # ImageNet
    assert doubtful_settings(dataclasses.replace(CONFIG, moco=MoCoV3Config()), 1) == []


def test_a_warm_up_as_long_as_the_training_is_doubted() -> None:
    optimizer = OptimizerConfig(warmup_epochs=1)
    (warning,) = doubtful_settings(dataclasses.replace(CONFIG, optimizer=optimizer), 200)
    assert warning.startswith("pretrain.optimizer.warmup_epochs is 1 of 1 epochs")


def test_a_queue_longer_than_a_quarter_of_the_data_is_doubted() -> None:
    (warning,) = doubtful_settings(with_moco(queue_length=408), 200)  # 1600 images
    assert warning.startswith("pretrain.moco.queue_length is 408 for 1600 images")
    assert "try 400" in warning


def test_a_moving_average_slower_than_a_tenth_of_the_training_is_doubted() -> None:
    (warning,) = doubtful_settings(with_moco(momentum=0.999), 100)
    assert warning.startswith("pretrain.moco.momentum is 0.999 for 100 steps")
    assert doubtful_settings(with_moco(momentum=1.0), 100) == []  # deliberately fixed


def test_size_of_a_checkpoint_is_that_of_its_file() -> None:
    state = build_state(CONFIG, torch.device("cpu"), data_digest="d")
    crops = torch.zeros((8, 2, 3, 32, 32), dtype=torch.uint8)
    list(train_steps(state, [Batch(crops, ["k"] * 8, StreamPosition(0, 0))], 100))
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    assert 0.99 < checkpoint_bytes(CONFIG) / len(file.getvalue()) < 1.01
