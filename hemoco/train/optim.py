"""Optimisers, and the schedules of learning rate and momentum as pure functions of the step.

Constants and schedules are those of the official recipes: docs/official-recipes.md lists them, and
tests/unit/config/test_recipes.py compares them recipe by recipe. v1: He et al. 2020
(arXiv:1911.05722), section 4. v2: Chen et al. 2020 (arXiv:2003.04297), section 3. v3: Chen, Xie,
He 2021 (arXiv:2104.02057), section 3 and appendix.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hemoco import foreach
from hemoco.config import MoCoConfig, MoCoV3Config, OptimizerConfig


def cosine_lr(epoch: float, epochs: float, base_lr: float) -> float:
    """Half a cosine, from `base_lr` at epoch 0 to 0 at `epochs`."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def step_lr(epoch: int, epochs: int, base_lr: float) -> float:
    """`base_lr`, times 0.1 from 60% and 0.01 from 80% of the epochs (120 and 160 of 200)."""
    # in integers: 0.6 * epochs is not exact
    drops = sum(10 * epoch >= tenths * epochs for tenths in (6, 8))
    return base_lr * 0.1**drops


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Factor of the learning rate: linear from 0 at step 0 to 1 at `warmup_steps`, then 1."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def learning_rate(
    config: OptimizerConfig, *, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """The learning rate of an optimiser step.

    It changes once per epoch (`step`, `cosine`: the official code of v1 and v2) or at every step
    (`cosine_per_step`: v3). Warm-up is always per step. A cosine begins where the warm-up ends.

    Args:
        config: schedule, warm-up and base learning rate.
        step: optimiser steps done before this one.
        steps_per_epoch: optimiser steps in an epoch.
        epochs: epochs of the whole training.
    """
    epoch = step // steps_per_epoch
    warmup = config.warmup_epochs
    if config.schedule == "step":
        scheduled = step_lr(epoch, epochs, config.lr)
    else:
        passed = step / steps_per_epoch if config.schedule == "cosine_per_step" else epoch
        scheduled = cosine_lr(max(0.0, passed - warmup), max(1, epochs - warmup), config.lr)
    return scheduled * warmup_factor(step, warmup * steps_per_epoch)


def key_momentum(config: MoCoConfig | MoCoV3Config, *, step: int, total_steps: int) -> float:
    """m of the key encoder's moving average at a step: constant, or in v3 half a cosine to 1."""
    if isinstance(config, MoCoConfig):
        return config.momentum
    return 1 - cosine_lr(step, total_steps, 1 - config.momentum)


class LARS(Optimizer):
    """SGD with momentum whose gradients are scaled to the norm of each parameter tensor.

    You, Gitman, Ginsburg 2017 (arXiv:1708.03888), algorithm 1, as MoCo v3 uses it: without epsilon
    and clipping. For gradient g, parameter p and velocity v a step is

        g += weight_decay * p
        g *= trust * |p| / |g|      unless a norm is 0
        v = momentum * v + g
        p -= lr * v

    The first two lines are left out for parameters of one dimension or none (biases, normalisation
    layers).

    Args:
        parameters: to train.
        lr: learning rate.
        momentum: factor of the velocity, in [0, 1).
        weight_decay: L2 penalty.
        trust: norm of a gradient after scaling, relative to that of its parameter.
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
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "adapt": True},
            {"params": [p for p in parameters if p.ndim <= 1], "adapt": False},
        ]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(groups, defaults)
        _start_velocities(self)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes one step; parameters without gradient are not changed."""
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
    """The optimiser of a config, with velocities of 0.

    SGD has all parameters in one group: the official recipes of v1 and v2 decay biases and BN too.
    """
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
    # Fused SGD makes the buffers at its first step. If the float16 scaler skips that step, they
    # are made but never written, and training continues from uninitialised memory:
    # tests/unit/train/test_train.py, test_float16_skips_the_step_of_gradients_that_overflow.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _adapted(
    parameters: list[nn.Parameter], gradients: list[Tensor], weight_decay: float, trust: float
) -> list[Tensor]:
    """Gradients with weight decay, scaled to the norms of their parameters; new tensors."""
    decayed = list(foreach.add(gradients, list[Tensor](parameters), alpha=weight_decay))
    parameter_norms = torch.stack(foreach.norm(list[Tensor](parameters)))
    gradient_norms = torch.stack(foreach.norm(decayed))
    scales = torch.where(
        (parameter_norms > 0) & (gradient_norms > 0),
        trust * parameter_norms / gradient_norms,
        torch.ones_like(parameter_norms),
    )
    foreach.mul_(decayed, list(scales.unbind()))
    return decayed
