"""Checks of a pretraining before it starts: settings that rarely work, and checkpoint size."""

import itertools

import torch

from hemoco.config import MoCoConfig, PretrainConfig
from hemoco.models.build import build_method, trained_parameters

_QUEUE_SHARE = 0.25
"""Longest queue as a share of the data set; a longer one holds keys of many images of the batch,
which are then negatives of themselves."""
_TIME_CONSTANTS = 10
"""Time constants of the moving average, 1 / (1 - m) steps each, that training should last."""


def doubtful_settings(config: PretrainConfig, steps_per_epoch: int) -> list[str]:
    """Warnings about settings that rarely work on a data set of this size.

    The defaults are made for ImageNet; on small data they fail without an error.

    Returns:
        Lines that name the setting, its value and what to do; empty if all is well.
    """
    total_steps = config.epochs * steps_per_epoch
    images = steps_per_epoch * config.global_batch_size
    moco = config.moco
    warnings = []
    if config.optimizer.warmup_epochs >= config.epochs:
        warnings.append(
            f"pretrain.optimizer.warmup_epochs is {config.optimizer.warmup_epochs} of "
            f"{config.epochs} epochs: the learning rate never reaches pretrain.optimizer.lr; "
            "lower it or train longer"
        )
    if not isinstance(moco, MoCoConfig):
        return warnings
    if moco.queue_length > _QUEUE_SHARE * images:
        batch_size = config.global_batch_size
        batches = int(_QUEUE_SHARE * images) // batch_size  # a queue holds whole batches
        warnings.append(
            f"pretrain.moco.queue_length is {moco.queue_length} for {images} images an epoch: "
            "negatives that show the query's own image hold training up; "
            f"try {max(batches, 1) * batch_size}"
        )
    if moco.momentum < 1 and 1 / (1 - moco.momentum) > total_steps / _TIME_CONSTANTS:
        warnings.append(
            f"pretrain.moco.momentum is {moco.momentum} for {total_steps} steps: the key encoder "
            f"follows in {1 / (1 - moco.momentum):.0f}; lower it or train longer"
        )
    return warnings


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Size of one checkpoint: encoders, queue and the optimiser's velocities.

    Builds the method on the CPU to measure it.
    """
    method = build_method(config, torch.device("cpu"))
    tensors = itertools.chain(method.state_dict().values(), trained_parameters(method))
    return sum(tensor.nbytes for tensor in tensors)
