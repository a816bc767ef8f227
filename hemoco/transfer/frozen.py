"""What the transfers from a frozen backbone share.

Shapes: M images, S x S pixels each, C classes.
"""

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hemoco.encoder import Backbone
from hemoco.transfer.result import LabelledImages

_BATCH, _MAX_BATCHES = 256, 16  # 4096 images fix a channel's mean and variance to about 2%


@torch.no_grad()
def calibrate_batch_norm(backbone: Backbone, images: Tensor) -> None:
    """Sets a random backbone's BN statistics to those of training images, and leaves it in evaluation mode.

    The statistics of a new network are mean 0 and variance 1, which are no network's: without this a frozen random
    backbone would be worse than random weights are. Uses the average over at most 16 batches of 256 images.

    Args:
        backbone: its parameters stay as they are.
        images: uint8 (M, 3, S, S), M >= 2.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
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


def count_classes(train: LabelledImages, test: LabelledImages) -> int:
    """C, the classes that the labels of both splits name."""
    return int(torch.cat([train.labels, test.labels]).max()) + 1


def accuracies(predictions: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy over images (`top1`) and its mean over the classes that occur (`per_class_accuracy`).

    Args:
        predictions: classes (M,).
        labels: classes (M,), on the same device.
    """
    right = (predictions == labels).cpu().double()
    counts = labels.cpu().bincount()  # (C,)
    per_class = labels.cpu().bincount(weights=right)[counts > 0] / counts[counts > 0]
    return {"top1": right.mean().item(), "per_class_accuracy": per_class.mean().item()}
