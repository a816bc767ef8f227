"""What tells a healthy contrastive training from a broken one, at the steps that are logged.

Shapes: N images, C embedding size, K queue length.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

COLLAPSED_STD = 0.1
"""Embedding std below which nearly all images have the same embedding; 1 is isotropic."""


def embedding_std(embeddings: Tensor) -> Tensor:
    """Std of unit vectors (N, C) over the images, mean over C, times sqrt(C): 1 if isotropic, 0 if all are equal."""
    spread = embeddings.float().std(dim=0, correction=0)  # (C,)
    return spread.mean() * math.sqrt(embeddings.shape[1])


def pretext_accuracy(logits: Tensor, top: int) -> Tensor:
    """Fraction of queries whose positive (column 0 of (N, 1 + K)) is among the `top` largest logits.

    Ties count against the positive, so that constant embeddings score 0.
    """
    better = (logits[:, 1:] >= logits[:, :1]).sum(dim=1)  # (N,)
    return (better < top).float().mean()


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def contrast_values(logits: Tensor, queries: Tensor, temperature: float) -> dict[str, Tensor]:
    """The diagnostics of one step by their MLflow names, scalars on the device.

    Args:
        logits: (N, 1 + K), the positive in column 0.
        queries: unit vectors (N, C).
        temperature: T, which the logits were divided by.
    """
    with torch.no_grad():
        similarities = logits * temperature
        return {
            "pretext_top1": pretext_accuracy(logits, 1),
            "pretext_top5": pretext_accuracy(logits, 5),
            "positive_similarity": similarities[:, 0].mean(),
            "negative_similarity": similarities[:, 1:].mean(),
            "embedding_std": embedding_std(queries),
        }
