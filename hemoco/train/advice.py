"""What can be said of a pretraining before it starts: settings that rarely work, and the size of its checkpoints."""

import itertools

import torch

from hemoco.config import MoCoConfig, PretrainConfig
from hemoco.models.build import build_method, trained_parameters

_QUEUE_SHARE = (
    0.25  # of the data set: above it a queue holds older views of many images of the batch
)
_LAGS = 10  # time constants of the moving average that a training should last


def doubtful_settings(config: PretrainConfig, steps_per_epoch: int) -> list[str]:
    """Warnings, each with the setting, its value and what to do; made for ImageNet, the defaults fail on small data."""
    total, images = config.epochs * steps_per_epoch, steps_per_epoch * config.global_batch_size
    moco, found = config.moco, []
    if config.optimizer.warmup_epochs >= config.epochs:
        found.append(
            f"pretrain.optimizer.warmup_epochs is {config.optimizer.warmup_epochs} of {config.epochs} epochs: the "
            "learning rate never reaches pretrain.optimizer.lr; lower it or train longer"
        )
    if not isinstance(moco, MoCoConfig):
        return found
    if moco.queue_length > _QUEUE_SHARE * images:
        most = int(_QUEUE_SHARE * images) // config.global_batch_size * config.global_batch_size
        found.append(
            f"pretrain.moco.queue_length is {moco.queue_length} for {images} images an epoch: negatives that show "
            f"the query's own image hold training up; try {max(most, config.global_batch_size)}"
        )
    if moco.momentum < 1 and 1 / (1 - moco.momentum) > total / _LAGS:
        found.append(
            f"pretrain.moco.momentum is {moco.momentum} for {total} steps: the key encoder follows in "
            f"{1 / (1 - moco.momentum):.0f}; lower it or train longer"
        )
    return found


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Size of one checkpoint: encoders, queue and the optimiser's velocities."""
    method = build_method(config, torch.device("cpu"))
    tensors = itertools.chain(method.state_dict().values(), trained_parameters(method))
    return sum(tensor.nbytes for tensor in tensors)
