"""Features of a frozen backbone, and the calibration of its BN statistics.

Shapes: M images of S x S pixels, F features.
"""

import torch
from torch import Tensor

from hemoco.models.batch_norm import BatchNorm
from hemoco.models.resnet import Backbone

CALIBRATION_IMAGES = 4096
"""Number of images that is enough to estimate a channel's mean and variance to about 2%."""
_BATCH = 256
_MAX_BATCHES = CALIBRATION_IMAGES // _BATCH


@torch.no_grad()
def calibrate_batch_norm(backbone: Backbone, images: Tensor) -> None:
    """Sets the BN statistics of a random backbone to those of training images.

    A new network has the running statistics mean 0 and variance 1, which do not match its
    activations; frozen like this, a random backbone would look worse than it is. The statistics
    are averaged over at most 16 batches of 256 images.

    Args:
        backbone: left in evaluation mode, with its parameters unchanged.
        images: uint8 (M, 3, S, S), M >= 2.
    """
    norms = [module for module in backbone.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then keeps the mean over all batches
    backbone.train()
    batches = -(-len(images) // _BATCH)
    for first in range(min(batches, _MAX_BATCHES)):
        # Every batch takes images from everywhere: shards are often sorted by class, and the images
        # of one class vary less than those of all.
        backbone(backbone.normalise(images[first::batches]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    backbone.eval()


@torch.no_grad()
def extract_features(backbone: Backbone, images: Tensor, batch_size: int = 256) -> Tensor:
    """Computes features in evaluation mode, on the backbone's device.

    The backbone's tensors and its mode are unchanged afterwards.

    Args:
        backbone: a backbone with all tensors on one device.
        images: uint8 RGB (M, 3, S, S).
        batch_size: number of images per forward pass; does not change the features.

    Returns:
        float32 (M, F) on the backbone's device.
    """
    was_training = backbone.training
    backbone.eval()
    try:
        parts = torch.split(images, batch_size)
        return torch.cat([backbone(backbone.normalise(part)).float() for part in parts])
    finally:
        backbone.train(was_training)
