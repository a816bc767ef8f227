"""`--pretrain.compile`, which needs a C++ compiler."""

import dataclasses

import pytest
import torch

from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.train.pretrain import build_state, train_steps

CONFIG = PretrainConfig(
    global_batch_size=8,
    log_every_steps=1,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    views=ViewsConfig(size=32, flip=0, jitter=0, grayscale=0, blur=(0, 0)),
    moco=MoCoConfig(embedding_size=16, queue_length=24, bn_group_size=4),
    stream=StreamConfig(lanes=1),
)


@pytest.mark.filterwarnings("ignore")  # raised in the compiler's own modules
def test_compiled_encoders_train_as_others_do() -> None:
    crops = torch.randint(
        256, (2, 8, 2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    batches = [Batch(crops[step], ["key"] * 8, StreamPosition(0, step)) for step in range(2)]
    cpu = torch.device("cpu")
    plain = build_state(CONFIG, cpu, data_digest="d")
    compiled = build_state(dataclasses.replace(CONFIG, compile=True), cpu, data_digest="d")
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    losses = [
        [m.values["loss"] for m in train_steps(state, batches, 2)] for state in (plain, compiled)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
