"""Batch normalisation in groups, and the permutation of keys over ranks (shuffling BN)."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hemoco.distributed import all_gather_cat, broadcast_object, mean_over_ranks, rank, world_size
from hemoco.models.batch_norm import SplitBatchNorm, split_batch_norms
from hemoco.models.shuffle import permute_global, shuffle_order
from tests.helpers.ranks import run_ranks


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@pytest.mark.parametrize("shape", [(12, 5, 3, 2), (12, 5)])
def test_each_group_has_zero_mean_and_unit_variance(shape: tuple[int, ...]) -> None:
    output = SplitBatchNorm(5, group_size=4)(images(*shape)).detach()
    for group in output.split(4):
        flat = group.transpose(0, 1).flatten(1)
        torch.testing.assert_close(flat.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
        variance = flat.var(dim=1, correction=0)
        torch.testing.assert_close(variance, torch.ones(5), atol=1e-4, rtol=0)  # eps is 1e-5


def test_running_statistics_follow_the_mean_over_groups() -> None:
    split, x = SplitBatchNorm(5, group_size=4), images(8, 5, 3, 2)
    split(x)
    expected_mean = 0.1 * (x[:4].mean(dim=(0, 2, 3)) + x[4:].mean(dim=(0, 2, 3))) / 2
    variances = [group.transpose(0, 1).flatten(1).var(dim=1) for group in (x[:4], x[4:])]
    torch.testing.assert_close(split.running_mean, expected_mean)
    torch.testing.assert_close(split.running_var, 0.9 + 0.1 * (variances[0] + variances[1]) / 2)
    assert split.num_batches_tracked == 1


def test_one_group_equals_plain_batch_norm_in_output_and_gradient() -> None:
    plain, split = nn.BatchNorm2d(5), SplitBatchNorm(5, group_size=8)
    a, b = (images(8, 5, 3, 2).requires_grad_() for _ in range(2))
    outputs = plain(a), split(b)
    for output in outputs:
        (output**3).sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(plain.running_var, split.running_var)


def test_evaluation_ignores_groups() -> None:
    split = SplitBatchNorm(5, group_size=4).eval()
    torch.testing.assert_close(split(images(3, 5, 2, 2)), images(3, 5, 2, 2) / (1 + 1e-5) ** 0.5)


def test_conversion_keeps_the_state_and_leaves_no_other_norm() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.Flatten(), nn.BatchNorm1d(4)
    )
    network(images(8, 3, 1, 1))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    split_batch_norms(network, group_size=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert list(network.state_dict()) == list(before)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert [norm.group_size for norm in norms] == [2, 2]


def test_a_batch_that_does_not_fill_its_groups_is_refused() -> None:
    with pytest.raises(AssertionError, match="6 images do not fill groups of 4"):
        SplitBatchNorm(5, group_size=4)(images(6, 5, 2, 2))


def test_order_is_a_permutation_that_depends_on_seed_and_step() -> None:
    orders = [
        tuple(shuffle_order(seed, step, 64).tolist())
        for seed, step in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert orders[0] == orders[3]
    assert len(set(orders)) == 3


class Permuted(NamedTuple):
    """Results of one rank that permuted tags: the slots of its 4 images in the global batch."""

    order: Tensor
    shuffled: Tensor
    restored: Tensor
    world_size: int
    gathered: Tensor
    mean: Tensor
    broadcast: str


def permute_tags() -> Permuted:
    tags = torch.arange(4.0).view(-1, 1) + rank() * 4  # (N, 1)
    order = shuffle_order(0, 5, world_size() * 4)
    shuffled = permute_global(tags, order)
    return Permuted(
        order=order,
        shuffled=shuffled,
        restored=permute_global(shuffled, order.argsort()),
        world_size=world_size(),
        gathered=all_gather_cat(tags),
        mean=mean_over_ranks(tags),
        broadcast=broadcast_object(f"from {rank()}"),
    )


@functools.cache
def permuted(world: int) -> list[Permuted]:
    """Results of all ranks; cached, as starting processes takes seconds."""
    return [permute_tags()] if world == 1 else run_ranks(permute_tags, world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffle_permutes_the_global_batch_and_unshuffle_restores_it(world: int) -> None:
    order = shuffle_order(0, 5, 4 * world)
    ranks = permuted(world)
    assert all(torch.equal(each.order, order) for each in ranks)
    assert torch.cat([each.shuffled for each in ranks]).flatten().tolist() == order.tolist()
    restored = torch.cat([each.restored for each in ranks])
    assert restored.flatten().tolist() == list(range(4 * world))


@pytest.mark.parametrize(("world", "group"), [(1, 2), (2, 4), (3, 4)])
def test_bn_groups_of_keys_differ_from_those_of_queries(world: int, group: int) -> None:
    tags = torch.cat([each.shuffled.flatten() for each in permuted(world)])
    key_groups = {frozenset(tags.tolist()) for tags in tags.split(group)}
    query_groups = {frozenset(tags.tolist()) for tags in torch.arange(4.0 * world).split(group)}
    assert not key_groups & query_groups


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_are_in_rank_order_and_agree(world: int) -> None:
    for each in permuted(world):
        assert each.world_size == world
        assert each.gathered.flatten().tolist() == list(range(4 * world))
        assert each.mean.flatten().tolist() == [(world - 1) * 2.0 + i for i in range(4)]
        assert each.broadcast == "from 0"
