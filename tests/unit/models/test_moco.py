"""MoCo v1 and v2: loss, keys, queue and moving average, on identity and on small encoders."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, StreamConfig
from hemoco.errors import ConfigError
from hemoco.models.batch_norm import SplitBatchNorm
from hemoco.models.build import build_method
from hemoco.models.heads import EmbeddingNetwork
from hemoco.models.moco import MoCo, MoCoOutput

CONFIG = PretrainConfig(
    global_batch_size=8,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=16, queue_length=32, bn_group_size=4),
    stream=StreamConfig(lanes=1),
)


def views(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def unit_rows(count: int, size: int, seed: int) -> Tensor:
    return functional.normalize(
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def tiny_moco(queue_length: int, *, seed: int = 0) -> MoCo:
    """MoCo on identity encoders: an image (2, 1, 1) is its own embedding."""
    network = EmbeddingNetwork(nn.Flatten(), nn.Identity(), "float32")
    config = MoCoConfig(embedding_size=2, queue_length=queue_length, bn_group_size=2)
    return MoCo(network, config, seed)


def with_moco(**changes: object) -> PretrainConfig:
    return dataclasses.replace(CONFIG, moco=dataclasses.replace(CONFIG.moco, **changes))  # type: ignore[arg-type]


def build(config: PretrainConfig = CONFIG) -> MoCo:
    method = build_method(config, torch.device("cpu"))
    assert isinstance(method, MoCo)
    return method


def run(moco: MoCo, query_views: Tensor, key_views: Tensor, step: int = 0) -> MoCoOutput:
    """One forward in one process, the key views given in the order of their queries."""
    order = moco.key_order(step, len(key_views))
    output: MoCoOutput = moco(moco.embed_keys(query_views, key_views[order], order), query_views)
    return output


def test_loss_is_info_nce_written_out() -> None:
    moco = build()
    output = run(moco, views(0), views(1))
    losses = []
    for query, key in zip(output.queries.tolist(), output.keys.tolist(), strict=True):
        terms = []
        for other in [key, *moco.queue.T.tolist()]:
            similarity = sum(a * b for a, b in zip(query, other, strict=True))
            terms.append(math.exp(similarity / 0.2))
        losses.append(-math.log(terms[0] / sum(terms)))
    assert output.contrast.loss.item() == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_collapsed_embeddings_cost_log_of_k_plus_one() -> None:
    moco = tiny_moco(32)
    moco.queue.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 32))
    images = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(4, 2, 1, 1)
    assert run(moco, images, images).contrast.loss.item() == pytest.approx(math.log(33), abs=1e-5)


def test_keys_come_back_in_the_order_of_their_images() -> None:
    images = unit_rows(8, 2, 0).view(8, 2, 1, 1)
    output = run(tiny_moco(32), images, images, 3)
    torch.testing.assert_close(output.keys, images.flatten(1))  # the rows are normalised once more
    assert torch.equal(output.keys, output.queries)


def test_keys_are_normalised_with_other_images_than_their_queries() -> None:
    moco = build()
    output = run(moco, views(0), views(0))
    # views and weights are the same: only the BN groups differ
    assert (output.queries - output.keys).abs().max() > 1e-3
    assert all(not isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm) for m in moco.modules())
    assert {m.group_size for m in moco.modules() if isinstance(m, SplitBatchNorm)} == {4}


def test_key_parameters_start_equal_and_get_no_gradient() -> None:
    moco = build(with_moco(head="mlp_bn"))
    pairs = list(zip(moco.key_encoder.parameters(), moco.query_encoder.parameters(), strict=True))
    assert all(torch.equal(key, query) for key, query in pairs)
    run(moco, views(0), views(1)).contrast.loss.backward()
    assert all(
        key.grad is None and not key.requires_grad and query.grad is not None
        for key, query in pairs
    )


@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 1.0), (0.0, 3.0), (0.75, 1.5)])
def test_moving_average_of_parameters(momentum: float, expected: float) -> None:
    network = EmbeddingNetwork(nn.Flatten(), nn.Linear(2, 2), "float32")
    moco = MoCo(network, MoCoConfig(embedding_size=2, queue_length=4), seed=0)
    for parameter, value in [
        (moco.key_encoder.head.weight, 1.0),
        (moco.query_encoder.head.weight, 3.0),
    ]:
        nn.init.constant_(parameter, value)
    moco.update_key_encoder(momentum)
    assert moco.key_encoder.head.weight.eq(expected).all()
    assert moco.query_encoder.head.weight.eq(3.0).all()


def test_moving_average_is_not_lost_to_low_precision() -> None:
    moco = build(dataclasses.replace(CONFIG, precision="bfloat16"))
    nn.init.constant_(moco.key_encoder.head[0].weight, 1.0)
    nn.init.constant_(moco.query_encoder.head[0].weight, 1.01)
    for _ in range(1000):
        moco.update_key_encoder(0.999)
    assert moco.key_encoder.head[0].weight[0, 0].item() == pytest.approx(1.006323, abs=1e-5)


def test_key_batch_norm_statistics_are_its_own() -> None:
    moco = build()
    run(moco, views(0), views(1) * 5)
    before = [buffer.clone() for buffer in moco.key_encoder.buffers()]
    moco.update_key_encoder(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, moco.key_encoder.buffers(), strict=True))
    assert all(module.training for module in moco.key_encoder.modules())
    key_variance = moco.key_encoder.encoder.bn1.running_var
    assert not torch.equal(key_variance, moco.query_encoder.encoder.bn1.running_var)


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (8, 4), (4, 4), (7, 3)])
def test_queue_wraps_without_dropping_the_tail(length: int, batch: int) -> None:
    moco = tiny_moco(length)
    expected = moco.queue.T.tolist()
    pointer = 0
    for step in range(6):
        keys = unit_rows(batch, 2, step)
        moco.enqueue(keys)
        for key in keys.tolist():
            expected[pointer] = key
            pointer = (pointer + 1) % length
        assert moco.queue.T.tolist() == expected
        assert moco.queue_pointer.item() == pointer
    torch.testing.assert_close(moco.queue.norm(dim=0), torch.ones(length))


def test_positives_are_not_among_the_negatives_until_enqueued() -> None:
    moco = build()
    output = run(moco, views(0), views(1))
    assert (output.keys @ moco.queue).max() < 1 - 1e-6
    moco.enqueue(output.keys)
    torch.testing.assert_close((output.keys @ moco.queue).max(dim=1).values, torch.ones(8))


def test_queue_starts_with_seeded_unit_columns() -> None:
    first, again, other = (tiny_moco(32, seed=seed).queue for seed in (1, 1, 2))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(32))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bfloat16_keeps_head_and_logits_in_float32() -> None:
    low = build(dataclasses.replace(CONFIG, precision="bfloat16"))
    dtypes = []
    for module in (low.query_encoder.encoder.layer1, low.query_encoder.head):
        module.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    loss = run(low, views(0), views(1)).contrast.loss
    exact = run(build(), views(0), views(1)).contrast.loss
    assert dtypes == [torch.bfloat16, torch.float32]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)  # bfloat16 has 3 digits


@pytest.mark.parametrize(
    ("head", "shapes"),
    [
        ("linear", {"weight": (16, 512), "bias": (16,)}),
        ("mlp", {"0.weight": (512, 512), "0.bias": (512,), "2.weight": (16, 512), "2.bias": (16,)}),
    ],
)
def test_heads_are_the_official_ones(head: str, shapes: dict[str, tuple[int, ...]]) -> None:
    state = build(with_moco(head=head)).query_encoder.head.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


def test_one_bn_group_for_the_whole_batch_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"pretrain.moco.bn_group_size is 8: it must be smaller than .* \(8\)"
    ):
        build(with_moco(bn_group_size=8))
