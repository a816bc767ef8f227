"""Labelled splits that are in memory."""

import hashlib

import torch
from torch import Tensor

from hemoco.data.labelled import LabelledSplit


def in_memory(images: Tensor, labels: Tensor, classes: tuple[str, ...] = ()) -> LabelledSplit:
    """A split of images (M, 3, S, S), uint8, with labels (M,)."""
    identity = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    return LabelledSplit(
        labels, classes, images.shape[-1], identity, lambda: iter(images.split(256))
    )


def images_of(split: LabelledSplit) -> Tensor:
    """All its images (M, 3, S, S)."""
    return torch.cat(list(split.batches()))
