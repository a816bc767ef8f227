"""InfoNCE, the contrastive loss (He et al. 2020, arXiv:1911.05722, section 3.1, equation 1).

    loss(q) = -log( exp(q . k+ / T) / (exp(q . k+ / T) + sum over negatives k of exp(q . k / T)) )

This is the cross-entropy of picking a query's positive key k+ from all keys, where the logit of a
key is its cosine similarity to the query, divided by the temperature T. The two functions differ
in where the negatives come from:

- `queue_contrast` (MoCo v1 and v2, Algorithm 1): from the queue of past keys.
- `batch_contrast` (MoCo v3, arXiv:2104.02057, Algorithm 1): the keys of all other images of the
  global batch. The loss is multiplied by 2 T.

Algorithm 1 of v1 concatenates all 1 + K logits and calls a cross-entropy function. `queue_contrast`
does not, because of memory: 256 queries against 65,536 keys are 67 MB of float32 logits, and
autograd would keep them, and their softmax, until backward. Only the queries need a gradient, and
it has a closed form:

    d loss / d q = (sum over all keys of softmax(logits)_k k - k+) / T

Both the loss and this (N, C) gradient can be summed up over the queue in pieces, with the running
maximum of FlashAttention (arXiv:2205.14135). The values are those of the plain form up to rounding:
tests/unit/models/test_info_nce.py compares them in float64 to 1e-6.

Logits are always float32, whatever the precision of the encoders: with bfloat16 the loss over
65,537 classes is visibly biased (docs/traps.md, number 27).

Shapes: N queries of this rank, G keys of the global batch, C embedding size, K queue length,
k keys in one piece of the queue.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CHUNK_LOGITS = 1 << 20
"""Logits computed at a time: 4 MB, which stay in a CPU's cache."""


class Contrast(NamedTuple):
    """Result of contrasting queries with their keys: the loss, and what the diagnostics need."""

    loss: Tensor
    """Mean over this rank's queries; a scalar with gradient."""
    positives: Tensor
    """Similarity of each query to its positive key (N,)."""
    negatives_ahead: Tensor
    """Number of negatives at least as similar to the query as its positive key, int64 (N,)."""
    negative_similarity: Tensor
    """Mean similarity over all pairs of a query and a negative; a scalar."""


def queue_contrast(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Contrast:
    """Contrasts each query with its key and the K queued negatives (equation 1).

    The N x (1 + K) logits are never in memory at once.

    Args:
        queries: unit vectors (N, C), with gradient.
        keys: unit vectors (N, C), without gradient; row i is the positive of query i.
        queue: unit vectors (C, K), without gradient.
        temperature: T, > 0.
    """
    losses, positives, negatives_ahead = _QueueLoss.apply(queries, keys, queue, temperature)
    with torch.no_grad():
        # the mean of all N x K products is the product of the means
        negative_similarity = queries.mean(dim=0) @ queue.mean(dim=1)
    return Contrast(losses.mean(), positives, negatives_ahead, negative_similarity)


def batch_contrast(queries: Tensor, keys: Tensor, first: int, temperature: float) -> Contrast:
    """Contrasts each query with the keys of the global batch, one of which is its positive.

    All G logits of a query are in memory: the G of MoCo v3 (4096) is small beside a queue.

    Args:
        queries: unit vectors (N, C), with gradient.
        keys: unit vectors (G, C) of all ranks in rank order, without gradient.
        first: row of `keys` that is the positive of query 0, i.e. rank * N; row first + i is the
            positive of query i. Without this offset only rank 0 would learn (docs/traps.md, 15).
        temperature: T, > 0; the cross-entropy is multiplied by 2 T.
    """
    logits = queries @ keys.T / temperature  # (N, G)
    labels = torch.arange(first, first + len(queries), device=queries.device)  # (N,)
    loss = functional.cross_entropy(logits, labels) * (2 * temperature)
    with torch.no_grad():
        positives = logits.gather(1, labels[:, None])  # (N, 1)
        # the comparison counts the positive itself
        negatives_ahead = (logits >= positives).sum(dim=1) - 1  # (N,)
        pairs = max(1, logits.numel() - len(logits))
        negative_similarity = (logits.sum() - positives.sum()) / pairs * temperature
    similarities = positives.squeeze(1) * temperature  # (N,)
    return Contrast(loss, similarities, negatives_ahead, negative_similarity)


class _QueueLoss(torch.autograd.Function):
    """Losses, positive similarities and numbers of negatives ahead, (N,) each, of N queries.

    The forward pass computes the gradient too; backward only multiplies it. Sums of exponentials
    are kept relative to the largest logit so far, and are rescaled when a larger one comes.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        positives = (queries * keys).sum(dim=1)  # (N,)
        # the positive key comes first, with weight exp(0) = 1
        largest = positives / temperature  # (N,) largest logit so far
        weight_sum = torch.ones_like(largest)  # (N,)
        weighted_keys = keys.clone()  # (N, C)
        negatives_ahead = torch.zeros_like(largest, dtype=torch.int64)  # (N,)
        chunk_length = max(1, _CHUNK_LOGITS // len(queries))
        for negatives in torch.split(queue, chunk_length, dim=1):  # (C, k)
            logits = queries @ negatives  # (N, k)
            negatives_ahead += (logits >= positives[:, None]).sum(dim=1)
            logits.div_(temperature)
            new_largest = torch.maximum(largest, logits.amax(dim=1))  # (N,)
            weights = logits.sub_(new_largest[:, None]).exp_()  # (N, k)
            rescale = (largest - new_largest).exp_()  # (N,)
            weight_sum.mul_(rescale).add_(weights.sum(dim=1))
            weighted_keys.mul_(rescale[:, None]).addmm_(weights, negatives.T)
            largest = new_largest
        gradients = (weighted_keys / weight_sum[:, None] - keys) / temperature  # (N, C)
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(positives, negatives_ahead)
        losses = largest + weight_sum.log() - positives / temperature  # (N,)
        return losses, positives, negatives_ahead

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        # one gradient for each argument of forward; keys, queue and temperature have none
        return losses[:, None] * gradients, None, None, None
