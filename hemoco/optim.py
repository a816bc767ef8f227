"""The optimiser of MoCo v1/v2 and its schedules as pure functions (He et al. 2020, section 4; Chen et al. 2020)."""

import math

import torch
from torch import nn

from hemoco.config import OptimizerConfig


def cosine_lr(epoch: int, epochs: int, base_lr: float) -> float:
    """Half a cosine from `base_lr` at epoch 0 towards 0 at `epochs`."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def step_lr(epoch: int, epochs: int, base_lr: float) -> float:
    """`base_lr`, times 0.1 from 60% and 0.01 from 80% of the epochs (120 and 160 of 200)."""
    drops = sum(10 * epoch >= tenths * epochs for tenths in (6, 8))
    return base_lr * 0.1**drops


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Share of the learning rate at an optimiser step: linear from 0 to 1 over the warm-up, then 1."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def learning_rate(config: OptimizerConfig, *, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of an optimiser step.

    The schedule is set once per epoch, as in the official code, the warm-up per step; a cosine begins where the
    warm-up ends.
    """
    epoch, warmup = step // steps_per_epoch, config.warmup_epochs
    if config.schedule == "step":
        scheduled = step_lr(epoch, epochs, config.lr)
    else:
        scheduled = cosine_lr(max(0, epoch - warmup), max(1, epochs - warmup), config.lr)
    return scheduled * warmup_factor(step, warmup * steps_per_epoch)


def build_optimizer(query_encoder: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over the query encoder in one group: weight decay on BN and biases too, as the official recipes."""
    return torch.optim.SGD(
        query_encoder.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
