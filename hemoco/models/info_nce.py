"""InfoNCE (eq. 1 of He et al. 2020): which of some keys is the query's?

Shapes: N images on this rank, G on all ranks, C embedding size, K queue length.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CHUNK_LOGITS = (
    1 << 20
)  # 4 MB, which a CPU keeps in its cache; all 65,537 logits of 256 queries would be 67


class Contrast(NamedTuple):
    """The loss and what the diagnostics tell of it."""

    loss: Tensor
    """() with gradient, mean over this rank's queries."""
    positives: Tensor
    """(N,) similarity of each query to its key."""
    ahead: Tensor
    """(N,) number of negatives at least as similar to the query as its key."""
    negative_similarity: Tensor
    """() mean over all pairs of a query and a negative."""


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Contrast:
    """Each query against its key and the K queued negatives; the 1 + K logits are never in memory at once.

    Args:
        queries: unit vectors (N, C), with gradient.
        keys: unit vectors (N, C), no gradient; row i is the positive of query i.
        queue: unit vectors (C, K), no gradient.
        temperature: T in eq. 1 of the paper, > 0.
    """
    losses, positives, ahead = _QueueLoss.apply(queries, keys, queue, temperature)
    with torch.no_grad():
        negative_similarity = queries.mean(dim=0) @ queue.mean(dim=1)
    return Contrast(losses.mean(), positives, ahead, negative_similarity)


def batch_contrast(queries: Tensor, keys: Tensor, first: int, temperature: float) -> Contrast:
    """Each query against the keys of all ranks, one of which is its own (Chen, Xie, He 2021, algorithm 1).

    Args:
        queries: unit vectors (N, C), with gradient.
        keys: unit vectors (G, C) of the global batch, no gradient.
        first: row of `keys` that is the positive of query 0; those of the others follow.
        temperature: T, > 0. The mean cross-entropy is multiplied by 2 T.
    """
    logits = queries @ keys.T / temperature  # (N, G)
    labels = torch.arange(first, first + len(queries), device=queries.device)  # (N,)
    loss = functional.cross_entropy(logits, labels) * (2 * temperature)
    with torch.no_grad():
        positives = logits.gather(1, labels[:, None])  # (N, 1)
        ahead = (logits >= positives).sum(dim=1) - 1  # the positive itself
        negatives = (logits.sum() - positives.sum()) / max(1, logits.numel() - len(logits))
    return Contrast(loss, positives.squeeze(1) * temperature, ahead, negatives * temperature)


class _QueueLoss(torch.autograd.Function):
    """Losses (N,), positive similarities (N,) and numbers of negatives ahead (N,) of queries.

    The gradient is known in the forward pass: it is the keys' mean under softmax, less the positive key, over T. Sums
    of exponentials and of weighted keys are kept relative to the largest logit so far, as in FlashAttention.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        positives = (queries * keys).sum(dim=1)  # (N,)
        top = positives / temperature  # (N,) largest logit so far
        total = torch.ones_like(top)  # (N,) of exponentials
        weighted = keys.clone()  # (N, C) sum of keys times exponentials
        ahead = torch.zeros_like(top, dtype=torch.int64)
        for negatives in torch.split(queue, max(1, _CHUNK_LOGITS // len(queries)), dim=1):
            logits = queries @ negatives  # (N, k)
            ahead += (logits >= positives[:, None]).sum(dim=1)
            logits.div_(temperature)
            higher = torch.maximum(top, logits.amax(dim=1))
            weights = logits.sub_(higher[:, None]).exp_()  # (N, k)
            shrink = (top - higher).exp_()
            total.mul_(shrink).add_(weights.sum(dim=1))
            weighted.mul_(shrink[:, None]).addmm_(weights, negatives.T)
            top = higher
        ctx.save_for_backward((weighted / total[:, None] - keys) / temperature)  # (N, C)
        ctx.mark_non_differentiable(positives, ahead)
        return top + total.log() - positives / temperature, positives, ahead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return losses[:, None] * gradient, None, None, None
