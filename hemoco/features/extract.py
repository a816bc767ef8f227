"""What is done to a backbone that stays frozen: its BN statistics, once, and its features.

Shapes: M images, S x S pixels each, F features.
"""

import torch
from torch import Tensor

from hemoco.models.batch_norm import BatchNorm
from hemoco.models.resnet import Backbone

CALIBRATION_IMAGES = 4096
"""Fix a channel's mean and variance to about 2%."""
_BATCH = 256
_MAX_BATCHES = CALIBRATION_IMAGES // _BATCH


@torch.no_grad()
def calibrate_batch_norm(backbone: Backbone, images: Tensor) -> None:
    """Sets a random backbone's BN statistics to those of training images, and leaves it in evaluation mode.

    The statistics of a new network are mean 0 and variance 1, which are no network's: without this a frozen random
    backbone would be worse than random weights are. Uses the average over at most 16 batches of 256 images.

    Args:
        backbone: its parameters stay as they are.
        images: uint8 (M, 3, S, S), M >= 2.
    """
    norms = [module for module in backbone.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    backbone.train()
    batches = -(-len(images) // _BATCH)
    for first in range(min(batches, _MAX_BATCHES)):
        # strided: images often lie sorted by class, and one class varies less than all
        backbone(backbone.normalise(images[first::batches]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.eval()


@torch.no_grad()
def extract_features(backbone: Backbone, images: Tensor, batch_size: int = 256) -> Tensor:
    """Features (M, F) in float32, computed in evaluation mode on the backbone's device, where they stay.

    The backbone's tensors and its mode are left as they were.

    Args:
        backbone: all of it on one device.
        images: uint8 RGB (M, 3, S, S).
        batch_size: images computed at a time; does not change the features.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        return torch.cat(
            [backbone(backbone.normalise(part)).float() for part in torch.split(images, batch_size)]
        )
    finally:
        backbone.train(was_training)
