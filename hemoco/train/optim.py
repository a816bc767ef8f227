"""Optimisers, and schedules as pure functions (He et al. 2020, section 4; Chen et al. 2020; Chen, Xie, He 2021)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hemoco import foreach
from hemoco.config import MoCoConfig, MoCoV3Config, OptimizerConfig


def cosine_lr(epoch: float, epochs: float, base_lr: float) -> float:
    """Half a cosine from `base_lr` at epoch 0 towards 0 at `epochs`."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def step_lr(epoch: int, epochs: int, base_lr: float) -> float:
    """`base_lr`, times 0.1 from 60% and 0.01 from 80% of the epochs (120 and 160 of 200)."""
    drops = sum(10 * epoch >= tenths * epochs for tenths in (6, 8))
    return base_lr * 0.1**drops


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at an optimiser step: linear from 0 to 1 over the warm-up, then 1."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def learning_rate(
    config: OptimizerConfig, *, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """The learning rate of an optimiser step.

    The schedule is set once per epoch, as in the official code of v1 and v2, or per step, as in v3; the warm-up always
    per step. A cosine begins where the warm-up ends.
    """
    epoch, warmup = step // steps_per_epoch, config.warmup_epochs
    if config.schedule == "step":
        scheduled = step_lr(epoch, epochs, config.lr)
    else:
        passed = step / steps_per_epoch if config.schedule == "cosine_per_step" else epoch
        scheduled = cosine_lr(max(0.0, passed - warmup), max(1, epochs - warmup), config.lr)
    return scheduled * warmup_factor(step, warmup * steps_per_epoch)


def key_momentum(config: MoCoConfig | MoCoV3Config, *, step: int, total_steps: int) -> float:
    """m of the key encoder's moving average at an optimiser step: constant, or in v3 half a cosine to 1."""
    if isinstance(config, MoCoConfig):
        return config.momentum
    return 1 - cosine_lr(step, total_steps, 1 - config.momentum)


class LARS(Optimizer):
    """SGD whose steps are scaled to the length of each parameter (You, Gitman, Ginsburg 2017, algorithm 1).

    With gradient g, parameter p and velocity v: g += weight_decay p; g *= trust |p| / |g|, unless either is 0;
    v = momentum v + g; p -= lr v. Groups with `adapt` False take neither weight decay nor scaling.

    Args:
        parameters: to train; those with one dimension or none (biases, normalisation) are not adapted.
        lr: learning rate.
        momentum: of the velocity.
        weight_decay: L2 penalty.
        trust: length of a step at lr 1 relative to the parameter's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float,
    ) -> None:
        every = list(parameters)
        groups = [
            {"params": [p for p in every if p.ndim > 1], "adapt": True},
            {"params": [p for p in every if p.ndim <= 1], "adapt": False},
        ]
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )
        _start_velocities(self)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without gradient stay."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            if group["adapt"]:
                gradients = _adapted(parameters, gradients, group["weight_decay"], group["trust"])
            velocities = [self.state[p]["momentum_buffer"] for p in parameters]
            foreach.mul_(velocities, group["momentum"])
            foreach.add_(velocities, gradients)
            foreach.add_(parameters, velocities, alpha=-group["lr"])


def build_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """LARS, or SGD in one group: weight decay on BN and biases too, as the official recipes of v1 and v2."""
    if config.kind == "lars":
        return LARS(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            trust=config.trust,
        )
    sgd = torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    _start_velocities(sgd)
    return sgd


def _start_velocities(optimizer: Optimizer) -> None:
    # fused SGD makes them itself at the first step, but uninitialised where float16's gradients overflow just then
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _adapted(
    parameters: list[nn.Parameter], gradients: list[Tensor], weight_decay: float, trust: float
) -> list[Tensor]:
    gradients = list(foreach.add(gradients, list[Tensor](parameters), alpha=weight_decay))
    lengths = torch.stack(foreach.norm(list[Tensor](parameters)))
    slopes = torch.stack(foreach.norm(gradients))
    ratios = torch.where(
        (lengths > 0) & (slopes > 0), trust * lengths / slopes, torch.ones_like(lengths)
    )
    foreach.mul_(gradients, list(ratios.unbind()))
    return gradients
