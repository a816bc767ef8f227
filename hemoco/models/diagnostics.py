"""What tells a healthy contrastive training from a broken one, at the steps that are logged.

Shapes: N images, C embedding size, K queue length.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hemoco.models.info_nce import Contrast

COLLAPSED_STD = 0.1
"""Embedding std below which nearly all images have the same embedding; 1 is isotropic."""


def embedding_std(embeddings: Tensor) -> Tensor:
    """Std of unit vectors (N, C) over the images, mean over C, times sqrt(C): 1 if isotropic, 0 if all are equal."""
    spread = embeddings.float().std(dim=0, correction=0)  # (C,)
    return spread.mean() * math.sqrt(embeddings.shape[1])


def pretext_accuracy(ahead: Tensor, top: int) -> Tensor:
    """Fraction of queries whose positive is among the `top` most similar; `ahead` (N,) counts the negatives before it.

    Ties count against the positive, so that constant embeddings score 0.
    """
    return (ahead < top).float().mean()


def alignment(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean squared distance of unit vectors (N, C) to their positives (Wang and Isola 2020, section 4.1): 0 is best."""
    return (queries - keys).square().sum(dim=1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Log of the mean Gaussian potential of pairs of unit vectors (N, C) (Wang and Isola 2020, section 4.2).

    0 if all are equal, towards -4 on a sphere that they fill evenly.
    """
    distances: Tensor = torch.pdist(embeddings.float())  # (N (N - 1) / 2,)
    return distances.square().mul(-2).exp().mean().log()


def effective_rank(embeddings: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values of (N, C) (Roy and Vetterli 2007): 1 to min(N, C)."""
    values = torch.linalg.svdvals(embeddings.float())  # (min(N, C),)
    shares = values / values.sum()
    return torch.xlogy(shares, shares).sum().neg().exp()


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def contrast_values(contrast: Contrast, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
    """The diagnostics of one step by their MLflow names, scalars on the device.

    Args:
        contrast: of the queries.
        queries: unit vectors (N, C).
        keys: unit vectors (N, C), the positives.
    """
    return {
        "loss": contrast.loss.detach(),
        "pretext_top1": pretext_accuracy(contrast.ahead, 1),
        "pretext_top5": pretext_accuracy(contrast.ahead, 5),
        "positive_similarity": contrast.positives.mean(),
        "negative_similarity": contrast.negative_similarity,
        "embedding_std": embedding_std(queries),
        "alignment": alignment(queries, keys),
        "uniformity": uniformity(queries),
        "effective_rank": effective_rank(queries),
    }
