"""MoCo v3 against the paper, and on two ranks against one process.

Nothing here is from the official code, which has a non-commercial licence.
"""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from hemoco.config import (
    EncoderConfig,
    MoCoV3Config,
    OptimizerConfig,
    PretrainConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.distributed import rank, world_size, wrap_for_gradients
from hemoco.errors import ConfigError
from hemoco.models.batch_norm import AllReduceBatchNorm, synchronise_batch_norms
from hemoco.models.build import build_method
from hemoco.models.moco_v3 import MoCoV3
from hemoco.train.pretrain import build_state, train_steps
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = PretrainConfig(
    epochs=2,
    global_batch_size=8,
    log_every_steps=1,
    views=ViewsConfig(size=32),
    encoder=EncoderConfig(architecture="resnet10t", stem="small", zero_init_last=True),
    moco=MoCoV3Config(embedding_size=16, hidden_size=32),
    optimizer=OptimizerConfig(
        kind="lars", lr=1.0, weight_decay=1e-6, schedule="cosine_per_step", warmup_epochs=1
    ),
    stream=StreamConfig(lanes=1),
)


def build() -> MoCoV3:
    method = build_method(CONFIG, CPU)
    assert isinstance(method, MoCoV3)
    return method


def views(seed: int) -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def my_part(values: Tensor) -> Tensor:
    return values.chunk(world_size())[rank()]


def normalised_by_all() -> tuple[Tensor, ...]:
    """Outputs, gradients of images, statistics and gradients of parameters of a small network."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6)
    )
    for number, parameter in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    synchronise_batch_norms(network, CPU)
    assert sum(isinstance(module, AllReduceBatchNorm) for module in network) == 2
    images = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(9)) * 3 + 5
    mine = my_part(images).requires_grad_()
    wrapped = wrap_for_gradients(network)
    output = wrapped(mine)
    output.pow(3).mul(torch.arange(6.0)).mean().backward()
    assert mine.grad is not None
    statistics = (network[1].running_mean, network[1].running_var, network[4].running_var)
    return (
        output.detach(),
        mine.grad / world_size(),
        *statistics,
        *(p.grad for p in network.parameters()),
    )


def test_all_reduce_bn_equals_one_process_on_the_whole_batch() -> None:
    alone, both = normalised_by_all(), run_ranks(normalised_by_all, 2)
    for found in both:
        for mine, expected in zip(found[2:], alone[2:], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    for index in (0, 1):  # outputs, and the gradients of the images
        joined = torch.cat([found[index] for found in both])
        torch.testing.assert_close(joined, alone[index], rtol=1e-5, atol=1e-5)


def test_one_process_of_all_reduce_bn_is_torchs() -> None:
    images = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, ours = nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))
    synchronise_batch_norms(ours, CPU)
    torch.testing.assert_close(ours(images), plain(images))
    assert ours[0].state_dict().keys() == plain.state_dict().keys()


def test_every_batch_norm_is_over_all_ranks() -> None:
    norms = [module for module in build().modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(module, AllReduceBatchNorm) for module in norms)
    cuda = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(3, affine=False)))
    synchronise_batch_norms(cuda, torch.device("cuda"))
    assert all(isinstance(m, nn.SyncBatchNorm) for m in cuda.modules() if isinstance(m, _BatchNorm))


def test_heads_have_the_papers_layers() -> None:
    config = dataclasses.replace(
        CONFIG, encoder=EncoderConfig(architecture="resnet50"), moco=MoCoV3Config()
    )
    method = build_method(config, CPU)
    assert isinstance(method, MoCoV3)
    shapes = [tuple(p.shape) for p in method.query_encoder.head.parameters()]
    # the last norm has neither scale nor shift
    assert shapes == [(4096, 2048), (4096,), (4096,), (256, 4096)]
    shapes = [tuple(p.shape) for p in method.predictor.parameters()]
    assert shapes == [(4096, 256), (4096,), (4096,), (256, 4096)]
    layers = [type(layer).__name__ for layer in method.query_encoder.head]
    assert layers == ["Linear", "AllReduceBatchNorm", "ReLU", "Linear", "AllReduceBatchNorm"]
    assert [type(layer).__name__ for layer in method.predictor] == layers[:4]


def test_losses_of_both_directions_add_up() -> None:
    method, first, second = build(), views(0), views(1)
    keys = method.embed_keys(first, second, None)
    expected = 0.0
    for query_views, key_views in ((first, second), (second, first)):
        queries = functional.normalize(method.predictor(method.query_encoder(query_views)), dim=1)
        logits = queries @ functional.normalize(method.key_encoder(key_views), dim=1).T
        expected += 2 * functional.cross_entropy(logits, torch.arange(8)).item()
    loss = method(keys, first, second).contrast.loss
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_key_encoder_follows_the_query_encoder_without_the_predictor() -> None:
    method = build()
    with torch.no_grad():
        method.query_encoder.head[0].weight.add_(1.0)
    before = method.key_encoder.head[0].weight.clone()
    method.update_key_encoder(0.75)
    torch.testing.assert_close(method.key_encoder.head[0].weight, before + 0.25)
    assert not any(p.requires_grad for p in method.key_encoder.parameters())
    assert all(p.requires_grad for p in method.predictor.parameters())


def trained() -> list[tuple[float, float]]:
    """Loss and gradient norm of four steps."""
    state = build_state(CONFIG, CPU, data_digest="d")
    crops = torch.randint(
        256, (4, 8, 2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    keys = ["k"] * (8 // world_size())
    made = [Batch(my_part(crops[i]), keys, StreamPosition(*divmod(i, 2))) for i in range(4)]
    return [(m.values["loss"], m.values["gradient_norm"]) for m in train_steps(state, made, 2)]


def test_two_ranks_train_as_one_process_does() -> None:
    alone, (first, second) = trained(), run_ranks(trained, 2)
    assert first == second
    for mine, expected in zip(first, alone, strict=True):
        # four steps of rounding, through BN over 8 images; 1.3e-4 was seen for the loss
        assert mine[0] == pytest.approx(expected[0], rel=1e-3)
        assert mine[1] == pytest.approx(expected[1], rel=1e-2)


def test_accumulation_and_compilation_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.compile is True"):
        dataclasses.replace(CONFIG, compile=True)
    with pytest.raises(
        ConfigError, match=r"pretrain\.accumulation_steps is 2: it must be 1 for MoCo v3"
    ):
        dataclasses.replace(CONFIG, accumulation_steps=2)
