"""Schedules against the tables of the papers, optimisers against their formulas in plain Python."""

import math

import pytest
import torch
from torch import nn

from hemoco.config import MoCoConfig, MoCoV3Config, OptimizerConfig
from hemoco.train.optim import (
    build_optimizer,
    cosine_lr,
    key_momentum,
    learning_rate,
    step_lr,
    warmup_factor,
)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.03), (100, 0.015), (199, 1.85e-6)])
def test_cosine_is_mocov2s_table(epoch: int, lr: float) -> None:
    assert cosine_lr(epoch, 200, 0.03) == pytest.approx(lr, rel=1e-3)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003)]
)
def test_steps_are_mocov1s_table(epoch: int, lr: float) -> None:
    assert step_lr(epoch, 200, 0.03) == pytest.approx(lr)


@pytest.mark.parametrize(("step", "factor"), [(0, 0), (5, 0.5), (10, 1), (11, 1)])
def test_warmup_is_linear_from_zero(step: int, factor: float) -> None:
    assert warmup_factor(step, 10) == factor
    assert warmup_factor(step, 0) == 1


@pytest.mark.parametrize(("epoch", "lr"), [(5, 4.8), (10, 9.6), (55, 4.8), (100, 0)])
def test_cosine_begins_where_the_warmup_ends(epoch: int, lr: float) -> None:
    config = OptimizerConfig(lr=9.6, warmup_epochs=10)
    assert learning_rate(config, step=epoch * 7, steps_per_epoch=7, epochs=100) == pytest.approx(lr)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_lr_changes_per_epoch_not_per_step(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule)  # type: ignore[arg-type]
    lrs = [learning_rate(config, step=step, steps_per_epoch=4, epochs=5) for step in range(20)]
    assert all(len(set(lrs[i : i + 4])) == 1 for i in range(0, 20, 4))
    assert lrs[0] == 1.0
    assert lrs[-1] == pytest.approx({"cosine": 0.0954915, "step": 0.01}[schedule])


def test_five_steps_equal_sgd_written_out() -> None:
    layer = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    expected = [p.detach().clone() for p in layer.parameters()]
    velocity = [torch.zeros_like(p) for p in expected]
    optimizer = build_optimizer(
        list(layer.parameters()), OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
    )
    for step in range(5):
        for p, mine, v in zip(layer.parameters(), expected, velocity, strict=True):
            p.grad = torch.cos(p.detach() * 7 + step)
            v.mul_(0.9).add_(p.grad + 0.01 * mine)
            mine.sub_(0.1 * v)
        optimizer.step()
    for p, mine in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), mine)


def test_weight_decay_is_on_all_parameters_in_one_group() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = build_optimizer(list(network.parameters()), OptimizerConfig(weight_decay=1e-4))
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 4
    assert group["weight_decay"] == 1e-4
    assert not group["nesterov"]


def test_v3_sets_its_cosine_per_step() -> None:
    config = OptimizerConfig(lr=9.6, warmup_epochs=10, schedule="cosine_per_step")
    expected = {
        20: 4.8,  # half of the warm-up
        40: 9.6,
        220: 4.8,  # half of the cosine
        221: 4.8 * (1 + math.cos(math.pi * 45.25 / 90)),
        399: 4.8 * (1 + math.cos(math.pi * 89.75 / 90)),
    }
    for step, lr in expected.items():
        ours = learning_rate(config, step=step, steps_per_epoch=4, epochs=100)
        assert ours == pytest.approx(lr)


@pytest.mark.parametrize(("epoch", "momentum"), [(0, 0.99), (50, 0.995), (100, 1.0)])
def test_v3s_momentum_rises_to_one(epoch: int, momentum: float) -> None:
    rising = key_momentum(MoCoV3Config(momentum=0.99), step=epoch * 4, total_steps=400)
    assert rising == pytest.approx(momentum)
    assert key_momentum(MoCoConfig(momentum=0.99), step=epoch * 4, total_steps=400) == 0.99


def norm(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def lars_written_out(
    p: list[float], v: list[float], g: list[float], *, adapt: bool
) -> tuple[list[float], list[float]]:
    """Parameters and velocities after a step, from those before it and the gradients."""
    if adapt:
        g = [gradient + 0.01 * x for gradient, x in zip(g, p, strict=True)]
        scale = 0.001 * norm(p) / norm(g) if norm(p) > 0 and norm(g) > 0 else 1.0
        g = [gradient * scale for gradient in g]
    v = [0.9 * old + gradient for old, gradient in zip(v, g, strict=True)]
    return [x - 0.5 * y for x, y in zip(p, v, strict=True)], v


def test_five_steps_equal_lars_written_out() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(2, 3, bias=False)
    ).double()
    nn.init.zeros_(network[2].weight)  # a parameter of norm 0 does not scale its gradient to 0
    parameters = list(network.parameters())
    config = OptimizerConfig(kind="lars", lr=0.5, momentum=0.9, weight_decay=0.01, trust=0.001)
    optimizer = build_optimizer(parameters, config)
    expected = [(p.flatten().tolist(), [0.0] * p.numel()) for p in parameters]
    for step in range(5):
        for number, p in enumerate(parameters):
            p.grad = torch.cos(p.detach() * 7 + step)
            if step == 1 and number == 4:
                p.grad = torch.zeros_like(p)
            gradients = p.grad.flatten().tolist()
            expected[number] = lars_written_out(*expected[number], gradients, adapt=p.ndim > 1)
        optimizer.step()
    for p, (values, _) in zip(parameters, expected, strict=True):
        assert p.flatten().tolist() == pytest.approx(values, abs=1e-6)
