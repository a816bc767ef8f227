"""Diagnostics that distinguish healthy contrastive training from a broken one.

They are measured at the steps that are logged. docs/is-my-loss-normal.md shows their curves.

Shapes: N images, C embedding size.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hemoco.models.info_nce import Contrast

COLLAPSED_STD = 0.1
"""Embedding std below which nearly all images have the same embedding; isotropic ones have 1."""


def embedding_std(embeddings: Tensor) -> Tensor:
    """Standard deviation over the images, mean over the components, times sqrt(C).

    Args:
        embeddings: unit vectors (N, C).

    Returns:
        A scalar: 1 if the embeddings are isotropic, 0 if they are all equal.
    """
    stds = embeddings.float().std(dim=0, correction=0)  # (C,)
    return stds.mean() * math.sqrt(embeddings.shape[1])


def pretext_accuracy(negatives_ahead: Tensor, top: int) -> Tensor:
    """Share of queries whose positive key is among the `top` most similar keys.

    Ties count against the positive, so that constant embeddings have an accuracy of 0.

    Args:
        negatives_ahead: (N,), number of negatives at least as similar as the positive.
        top: number of keys, > 0.
    """
    return (negatives_ahead < top).float().mean()


def alignment(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean squared distance of queries to their positives, unit vectors (N, C) each; 0 is best.

    Wang and Isola 2020 (arXiv:2005.10242), section 4.1.
    """
    return (queries - keys).square().sum(dim=1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Logarithm of the mean Gaussian potential exp(-2 d^2) over pairs of unit vectors (N, C).

    0 if all are equal, near -4 if they fill the sphere evenly. Wang and Isola 2020
    (arXiv:2005.10242), section 4.2.
    """
    distances: Tensor = torch.pdist(embeddings.float())  # (N (N - 1) / 2,)
    return distances.square().mul(-2).exp().mean().log()


def effective_rank(embeddings: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values of (N, C); between 1 and min(N, C).

    Roy and Vetterli 2007, "The effective rank".
    """
    values = torch.linalg.svdvals(embeddings.float())  # (min(N, C),)
    shares = values / values.sum()
    return torch.xlogy(shares, shares).sum().neg().exp()


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """L2 norm of all gradients taken together; parameters without gradient are left out."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def contrast_values(contrast: Contrast, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """Diagnostics of one forward pass by their names in MLflow; scalars on the device.

    Args:
        contrast: output of the method for these queries.
        queries: unit vectors (N, C).
        keys: unit vectors (N, C); row i is the positive of query i.
    """
    return {
        "loss": contrast.loss.detach(),
        "pretext_top1": pretext_accuracy(contrast.negatives_ahead, 1),
        "pretext_top5": pretext_accuracy(contrast.negatives_ahead, 5),
        "positive_similarity": contrast.positives.mean(),
        "negative_similarity": contrast.negative_similarity,
        "embedding_std": embedding_std(queries),
        "alignment": alignment(queries, keys),
        "uniformity": uniformity(queries),
        "effective_rank": effective_rank(queries),
    }
