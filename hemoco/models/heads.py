"""Projection and prediction heads, the encoder with its head, and the moving average (He et al. 2020, section 3.2).

Shapes: N images on this rank, C embedding size, F backbone features.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from hemoco import foreach

Precision = Literal["float32", "bfloat16", "float16"]


class EmbeddingNetwork(nn.Module):
    """Encoder and head: images (N, 3, H, W) -> embeddings (N, C) in float32, of any length."""

    def __init__(self, encoder: nn.Module, head: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.precision = precision

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, C)."""
        images = images.contiguous(memory_format=torch.channels_last)
        lower = self.precision != "float32"
        with torch.autocast(
            images.device.type, getattr(torch, self.precision) if lower else None, enabled=lower
        ):
            features = self.encoder(images)  # (N, F)
        embeddings: Tensor = self.head(features.float())
        return embeddings


@torch.no_grad()
def move_towards(
    followers: Iterable[Parameter], leaders: Iterable[Parameter], momentum: float
) -> None:
    """follower = m follower + (1 - m) leader (eq. 2), in the parameters' own float32."""
    foreach.lerp_(list[Tensor](followers), list[Tensor](leaders), 1 - momentum)


def build_head(
    kind: Literal["linear", "mlp", "mlp_bn"], features: int, embedding_size: int
) -> nn.Module:
    """The projection head of v1 (linear) or v2 (mlp), (N, F) -> (N, C)."""
    if kind == "linear":
        return nn.Linear(features, embedding_size)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding_size)
        )
    return nn.Sequential(
        nn.Linear(features, features, bias=False),  # BN has the bias
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, embedding_size),
    )


def build_projector(features: int, hidden_size: int, embedding_size: int) -> nn.Module:
    """F -> D -> C, its last layer followed by batch normalisation without scale and shift."""
    return nn.Sequential(
        *_hidden_layer(features, hidden_size),
        nn.Linear(hidden_size, embedding_size, bias=False),
        nn.BatchNorm1d(embedding_size, affine=False),
    )


def build_predictor(embedding_size: int, hidden_size: int) -> nn.Module:
    """C -> D -> C, its last layer bare: that is how ResNets have it."""
    return nn.Sequential(
        *_hidden_layer(embedding_size, hidden_size),
        nn.Linear(hidden_size, embedding_size, bias=False),
    )


def _hidden_layer(size: int, hidden_size: int) -> tuple[nn.Module, ...]:
    return nn.Linear(size, hidden_size, bias=False), nn.BatchNorm1d(hidden_size), nn.ReLU()
