"""MoCo v1 and v2: momentum contrast with a queue of negatives.

v1 is He et al. 2020 (arXiv:1911.05722): section 3.2 for queue and key encoder, 3.3 for shuffling
BN, Algorithm 1 for the whole. v2 is Chen et al. 2020 (arXiv:2003.04297, section 2): the same
algorithm with an MLP head, more augmentation and a cosine schedule, all of which are settings.

One training step calls, in this order (the loop is `hemoco.train.pretrain`):

    update_key_encoder(m)         f_k.params = m * f_k.params + (1 - m) * f_q.params   equation 2
    embed_keys(...)               k = f_k(x_k), without gradient, in shuffled order    section 3.3
    forward(keys, query_views)    q = f_q(x_q); loss = InfoNCE(q, k, queue)            equation 1
    backward, optimiser step      update(f_q.params)
    finish_step(keys)             enqueue(queue, k); dequeue(queue)

Where this differs from the official code, and why:

- **The moving average comes first.** Algorithm 1 ends a step with it; the official code takes it
  between the forward passes of queries and keys. All three give the same keys: queries do not
  depend on the key encoder, and before the first step both encoders are equal.
- **Keys are computed for the whole batch before the first query.** With gradient accumulation the
  queries go through the encoder in parts. Keys must not: they are shuffled over the whole batch.
- **Keys are enqueued after the optimiser step**, not in the forward pass. All parts of a batch
  then have the same negatives, and no query has its own key among them (docs/traps.md, 9).
- **BN groups have a fixed size** instead of one group for each GPU: see `hemoco.models.shuffle`.

Queue and pointer are buffers, hence part of a checkpoint: resumed with a random queue, training
would need a whole turn of the queue to recover (docs/traps.md, 13). Every rank holds the same
queue, as each enqueues the keys of all ranks.

Shapes: N images on this rank, n of them in one forward pass (n = N without gradient accumulation),
G on all ranks, C embedding size, K queue length, H x W the size of a view.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import MoCoConfig
from hemoco.distributed import all_gather_cat
from hemoco.models.heads import EmbeddingNetwork, move_towards
from hemoco.models.info_nce import Contrast, queue_contrast
from hemoco.models.shuffle import permute_global, shuffle_order


class MoCoOutput(NamedTuple):
    """Result of one forward pass, of MoCo v3 too."""

    contrast: Contrast
    """The loss and its diagnostics."""
    queries: Tensor
    """Unit vectors (n, C), with gradient."""
    keys: Tensor
    """Unit vectors (n, C), without gradient; row i is the positive of query i."""


class MoCo(nn.Module):
    """Query encoder, key encoder (the moving average of the former), and the queue of past keys."""

    symmetric = False
    """True if `forward` takes the key views too, to contrast them as queries."""

    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, query_encoder: EmbeddingNetwork, config: MoCoConfig, seed: int) -> None:
        """Copies the key encoder from the query encoder and fills the queue with random vectors.

        Args:
            query_encoder: f_q, trained by the optimiser.
            config: settings of the method.
            seed: seed of the first queue and of the shuffling, equal on all ranks.
        """
        super().__init__()
        self.config = config
        self.seed = seed
        self.query_encoder = query_encoder
        self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        queue = torch.randn(config.embedding_size, config.queue_length, generator=generator)
        self.register_buffer("queue", functional.normalize(queue, dim=0))  # (C, K)
        # column of the oldest keys; a tensor, so that it is saved with the queue
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def key_order(self, step: int, global_batch_size: int) -> Tensor:
        """The order (G,) in which the images of the global batch are embedded as keys at a step."""
        return shuffle_order(self.seed, step, global_batch_size)

    @torch.no_grad()
    def embed_keys(self, query_views: Tensor, key_views: Tensor, order: Tensor | None) -> Tensor:
        """The keys of this rank's images, in the order of the images.

        Args:
            query_views: not used; MoCo v3 embeds both views as keys.
            key_views: (N, 3, H, W), normalised, of the images order[rank * N: (rank + 1) * N] of
                the global batch.
            order: permutation (G,) of the global batch, on the CPU, equal on all ranks.

        Returns:
            Unit vectors (N, C).
        """
        assert order is not None, "keys are shuffled"
        shuffled = functional.normalize(self.key_encoder(key_views), dim=1)  # (N, C)
        return permute_global(shuffled, order.argsort())

    def forward(self, keys: Tensor, query_views: Tensor) -> MoCoOutput:
        """Contrasts queries with their keys and the queue.

        Args:
            keys: unit vectors (n, C); row i is the positive of query i.
            query_views: (n, 3, H, W), normalised.
        """
        queries = functional.normalize(self.query_encoder(query_views), dim=1)  # (n, C)
        contrast = queue_contrast(queries, keys, self.queue, self.config.temperature)
        return MoCoOutput(contrast, queries, keys)

    def finish_step(self, keys: Tensor) -> None:
        """Enqueues the keys (N, C) of this rank and of all others; called after backward."""
        self.enqueue(all_gather_cat(keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest entries of the queue by the keys (G, C); wraps around its end."""
        length = self.config.queue_length
        offsets = torch.arange(len(keys), device=keys.device)  # (G,)
        columns = (self.queue_pointer + offsets) % length  # (G,)
        self.queue.index_copy_(1, columns, keys.T)
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % length)

    def update_key_encoder(self, momentum: float) -> None:
        """Moves the key encoder's parameters towards the query encoder's (equation 2).

        BN statistics are not averaged: the key encoder keeps its own, as in the official code.
        """
        move_towards(self.key_encoder.parameters(), self.query_encoder.parameters(), momentum)
