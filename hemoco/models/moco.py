"""MoCo v1/v2 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297).

Shapes: N images on this rank, G on all ranks, C embedding size, K queue length, F backbone features.
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
    """What one forward gives."""

    contrast: Contrast
    queries: Tensor
    """(N, C) unit vectors."""
    keys: Tensor
    """(N, C) unit vectors, without gradient; row i is the positive of query i."""


class MoCo(nn.Module):
    """Query encoder, its moving average the key encoder, and the queue of past keys.

    One step is `update_key_encoder`, `embed_keys`, then `forward` and backward of the images, at once or in parts,
    optimiser step, `finish_step`. The official code averages between the forward passes of queries and keys; before
    both is the same, as queries do not depend on the key encoder.
    """

    symmetric = False
    """Whether key views serve as queries, too."""

    queue: Tensor
    queue_pointer: Tensor

    def __init__(self, query_encoder: EmbeddingNetwork, config: MoCoConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.query_encoder = query_encoder
        self.key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        queue = torch.randn(config.embedding_size, config.queue_length, generator=generator)
        self.register_buffer("queue", functional.normalize(queue, dim=0))  # (C, K)
        self.register_buffer("queue_pointer", torch.zeros((), dtype=torch.int64))

    def key_order(self, step: int, global_batch_size: int) -> Tensor:
        """The order (G,) in which the images of the global batch are to come as key views at a step."""
        return shuffle_order(self.seed, step, global_batch_size)

    @torch.no_grad()
    def embed_keys(self, _: Tensor, key_views: Tensor, order: Tensor | None) -> Tensor:
        """The keys (N, C) of this rank's images, unit vectors.

        Args:
            key_views: (N, 3, H, W), normalised, of the images at order[rank * N: (rank + 1) * N] of the global batch.
            order: permutation (G,) of the global batch, on the CPU, equal on all ranks.
        """
        assert order is not None, "keys are shuffled"
        shuffled = functional.normalize(self.key_encoder(key_views), dim=1)  # (N, C)
        return permute_global(shuffled, order.argsort())

    def forward(self, keys: Tensor, query_views: Tensor) -> MoCoOutput:
        """Contrasts the queries of n images, (n, 3, H, W) normalised, with their keys (n, C) and the queue."""
        queries = functional.normalize(self.query_encoder(query_views), dim=1)  # (n, C)
        return MoCoOutput(
            queue_contrast(queries, keys, self.queue, self.config.temperature), queries, keys
        )

    def finish_step(self, keys: Tensor) -> None:
        """Enqueues the keys (N, C) of this rank and all others; after backward."""
        self.enqueue(all_gather_cat(keys))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest entries of the queue, around its end; keys (G, C) of all ranks."""
        places = (
            self.queue_pointer + torch.arange(len(keys), device=keys.device)
        ) % self.config.queue_length
        self.queue.index_copy_(1, places, keys.T)
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % self.config.queue_length)

    def update_key_encoder(self, momentum: float) -> None:
        """Moves the key parameters towards the query's; BN statistics stay the key encoder's."""
        move_towards(self.key_encoder.parameters(), self.query_encoder.parameters(), momentum)
