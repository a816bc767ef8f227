"""MoCo v1/v2 (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297).

Shapes: N images on this rank, G on all ranks, C embedding size, K queue length, F backbone features.
"""

import copy
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import MoCoConfig, PretrainConfig
from hemoco.distributed import world_size
from hemoco.encoder import build_encoder, seeded
from hemoco.errors import ConfigError
from hemoco.shuffle_bn import permute_global, shuffle_order, split_batch_norms


class MoCoOutput(NamedTuple):
    """What one forward gives."""

    loss: Tensor
    """() with gradient, mean over this rank's queries."""
    logits: Tensor
    """(N, 1 + K), the positive in column 0."""
    queries: Tensor
    """(N, C) unit vectors."""
    keys: Tensor
    """(N, C) unit vectors, without gradient; row i is the positive of query i."""


def contrastive_logits(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Similarity of each query to its key (column 0) and to the K queued negatives.

    Args:
        queries: unit vectors (N, C), with gradient.
        keys: unit vectors (N, C), no gradient; row i is the positive of query i.
        queue: unit vectors (C, K).
        temperature: T in eq. 1 of the paper, > 0.

    Returns:
        Logits (N, 1 + K), divided by the temperature.
    """
    positives = (queries * keys).sum(dim=1, keepdim=True)  # (N, 1)
    negatives = queries @ queue  # (N, K)
    return torch.cat([positives, negatives], dim=1) / temperature


class EmbeddingNetwork(nn.Module):
    """Encoder and projection head: images (N, 3, H, W) -> unit vectors (N, C) in float32."""

    def __init__(self, encoder: nn.Module, head: nn.Module, precision: Literal["float32", "bfloat16"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Unit vectors (N, C)."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            features = self.encoder(images)  # (N, F)
        return functional.normalize(self.head(features.float()), dim=1)


class MoCo(nn.Module):
    """Query encoder, its moving average the key encoder, and the queue of past keys.

    One step is `update_key_encoder`, `forward`, backward, optimiser step, `enqueue`. The official code averages between
    the forward passes of queries and keys; before both is the same, as queries do not depend on the key encoder, and it
    keeps `forward` free of changes to parameters, as DistributedDataParallel expects.
    """

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

    def forward(self, query_views: Tensor, key_views: Tensor, step: int) -> MoCoOutput:
        """Contrasts each query with its key and the queue.

        Args:
            query_views: (N, 3, H, W), normalised.
            key_views: (N, 3, H, W), the other views of the same images.
            step: optimiser steps done; decides the shuffle of the keys.
        """
        queries = self.query_encoder(query_views)  # (N, C)
        keys = self._embed_keys(key_views, step)  # (N, C)
        logits = contrastive_logits(queries, keys, self.queue, self.config.temperature)  # (N, 1 + K)
        loss = functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))
        return MoCoOutput(loss, logits, queries, keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replaces the oldest entries of the queue, around its end; keys (G, C) of all ranks, after backward."""
        places = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % self.config.queue_length
        self.queue.index_copy_(1, places, keys.T)
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % self.config.queue_length)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """Moves the key parameters towards the query's (eq. 2), in float32; BN statistics stay the key encoder's."""
        keys: list[Tensor] = list(self.key_encoder.parameters())
        queries: list[Tensor] = list(self.query_encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - momentum)

    @torch.no_grad()
    def _embed_keys(self, key_views: Tensor, step: int) -> Tensor:
        order = shuffle_order(self.seed, step, world_size() * len(key_views))  # (G,)
        shuffled = self.key_encoder(permute_global(key_views, order))  # (N, C) in shuffled order
        return permute_global(shuffled, order.argsort())


def build_method(config: PretrainConfig) -> MoCo:
    """The method with its initial weights, a function of the config alone.

    Raises:
        ConfigError: unknown architecture, or all images share their batch statistics.
    """
    moco = config.moco
    if moco.bn_group_size == config.global_batch_size:
        raise ConfigError(
            f"pretrain.moco.bn_group_size is {moco.bn_group_size}: it must be smaller than pretrain.global_batch_size "
            f"({config.global_batch_size}), else shuffling cannot part a key from its query"
        )
    encoder = build_encoder(config.encoder, config.seed)
    with seeded(config.seed + 1):
        head = _build_head(moco.head, int(encoder.num_features), moco.embedding_size)  # type: ignore[arg-type]
    network = EmbeddingNetwork(encoder, head, config.precision)
    split_batch_norms(network, moco.bn_group_size)
    return MoCo(network, moco, config.seed).to(memory_format=torch.channels_last)


def _build_head(kind: Literal["linear", "mlp", "mlp_bn"], features: int, embedding_size: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(features, embedding_size)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding_size))
    return nn.Sequential(
        nn.Linear(features, features, bias=False),  # BN has the bias
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, embedding_size),
    )
