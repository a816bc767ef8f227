"""Samples of features with known classes."""

import torch

from hemoco.features.sample import FeatureSample


def sample_of(images: int) -> FeatureSample:
    """Returns a sample of two classes whose features are far apart."""
    labels = torch.arange(images) % 2
    features = (
        torch.randn(images, 8, generator=torch.Generator().manual_seed(0)) * 0.1
        + 2 * labels[:, None]
        - 1
    )
    thumbnails = torch.full((images, 3, 8, 8), 90, dtype=torch.uint8)
    keys = tuple(f"image {row}" for row in range(images))
    return FeatureSample(features.half(), thumbnails, labels, keys, ("left", "right <2>"), "test")
